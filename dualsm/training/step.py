"""The train step: a pure function of the train state and a batch of packed sequences.

rows -> examples (mixture) -> summed gradients (gradients) -> division by the batch's loss denominator
     -> update (optimizer), skipped if not finite -> metrics and loss statistics (step_metrics)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from dualsm.devices.sharding import constrain
from dualsm.model import transformer
from dualsm.objectives import mixture
from dualsm.objectives.example import Row, SpecialIds
from dualsm.objectives.pairs import Entry, bind_members, members_of
from dualsm.optimizers.optimizer import at_step
from dualsm.training.gradients import TrainingRows, make_gradient_function
from dualsm.training.row_weights import make_row_weights
from dualsm.training.step_metrics import (
    LossStats,
    StepMetrics,
    accumulate_metrics,
    init_loss_stats,
    init_metrics,
    step_metrics,
)
from dualsm.training.weight_average import update_average

_DROPOUT = 2**31  # folded into the key of a step; larger than the row indices folded in for corruption


class Batch(NamedTuple):
    """The B rows of a step.

    Attributes:
      tokens_BxL1, documents_BxL1: int32; see `Row`.
      objective_B: int32; index of each row's objective among the members of the run's entries.
      stratum_B, strata_B: int32; see `Row`.
    """

    tokens_BxL1: jax.Array
    documents_BxL1: jax.Array
    objective_B: jax.Array
    stratum_B: jax.Array
    strata_B: jax.Array


class TrainState(NamedTuple):
    """The state that a step updates and a checkpoint contains.

    Attributes:
      step: int32 []; number of finished steps, skipped updates included.
      params: parameters.
      opt_state: state of the optimizer.
      metrics: sums since the last log line.
      loss_stats: statistics for spike detection.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    metrics: StepMetrics
    loss_stats: LossStats


class AveragedTrainState(NamedTuple):
    """A `TrainState` with `ema`, the moving average of the parameters.

    A separate type, because Orbax only restores checkpoints that have exactly the fields of the state.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    metrics: StepMetrics
    loss_stats: LossStats
    ema: dict


def with_params(state: TrainState | AveragedTrainState, params: dict) -> TrainState | AveragedTrainState:
    """Returns the state with other parameters; a moving average starts from them."""
    state = state._replace(params=params)
    return state._replace(ema=jax.tree.map(jnp.copy, params)) if hasattr(state, "ema") else state


def init_state(
    config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation, num_objectives: int
) -> TrainState | AveragedTrainState:
    """Returns the state before the first step, determined by `config.seed`."""
    params = transformer.init_params(config.model, jax.random.key(config.seed))
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        metrics=init_metrics(num_objectives),
        loss_stats=init_loss_stats(num_objectives),
    )
    return AveragedTrainState(*state, ema=jax.tree.map(jnp.copy, params)) if config.ema.decay else state


def make_train_step(
    config: ml_collections.ConfigDict,
    entries: Sequence[Entry],
    special: SpecialIds,
    optimizer: optax.GradientTransformation,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the step function, to be jitted with donation of the state.

    Args:
      config: the run's config, with `model.vocab_size` filled in.
      entries: entries of the mixture, whose members `Batch.objective_B` refers to.
      special: the tokenizer's special ids.
      optimizer: from `make_optimizer`.

    Returns:
      A function (state, batch) -> (state, metrics). The metrics are also in the state; the copy can be read
      while the next step donates the state.
    """
    members = members_of(entries)
    # Sources share their objectives: an objective of several sources is computed once.
    distinct = [member for j, member in enumerate(members) if member not in members[:j]]
    distinct_J = np.array([distinct.index(member) for member in members], np.int32)
    objectives = bind_members(distinct, special)
    row_weights = make_row_weights(entries)
    gradients = make_gradient_function(config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        rows = batch.tokens_BxL1.shape[0]
        progress_B = jnp.full(rows, state.step / config.steps, jnp.float32)
        row = Row(batch.tokens_BxL1, batch.documents_BxL1, batch.stratum_B, batch.strata_B, progress_B)
        objective_B = batch.objective_B
        if len(distinct) < len(members):
            objective_B = jnp.asarray(distinct_J)[objective_B]
        example = mixture.make_examples(objectives, row, objective_B, mixture.row_keys(key, rows))
        example = jax.tree.map(lambda a: constrain(a, "batch", None), example)

        weights = row_weights(batch.objective_B, example.loss_denominator_L)
        dropout_keys_Bx2 = None
        if config.model.dropout:
            dropout_key = jax.random.fold_in(key, _DROPOUT)
            dropout_keys_Bx2 = jax.random.key_data(mixture.row_keys(dropout_key, rows))
        grads, stats = gradients(state.params, TrainingRows(example, weights, dropout_keys_Bx2))
        denominator_B = stats.loss_denominator_B
        if weights.denominator_B is not None:
            denominator_B = denominator_B * weights.denominator_B
        denominator = denominator_B.sum()
        grads = jax.tree.map(lambda g: g / jnp.maximum(denominator, 1.0), grads)
        gradient_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(gradient_norm) & jnp.isfinite(stats.nll_B.sum())

        params, opt_state = _update_if_finite(optimizer, state, grads, finite)
        new = step_metrics(stats, batch.objective_B, weights.nll_B, denominator, gradient_norm, len(members))
        restart = state.step % config.log.every == 0
        metrics, loss_stats = accumulate_metrics(state.metrics, state.loss_stats, new, finite, restart)
        new_state = TrainState(state.step + 1, params, opt_state, metrics, loss_stats)
        if config.ema.decay:
            ema = update_average(config.ema, state.ema, params, new_state.step)
            new_state = AveragedTrainState(*new_state, ema=ema)
        return new_state, metrics

    return train_step


def _update_if_finite(
    optimizer: optax.GradientTransformation, state: TrainState, grads: dict, finite: jax.Array
) -> tuple[dict, optax.OptState]:
    """Returns the new parameters and optimizer state if `finite`, else the old ones."""

    def update(params: dict, opt_state: optax.OptState):
        # The learning rate depends on the step, not on the number of updates made so far.
        updates, opt_state = optimizer.update(grads, at_step(opt_state, state.step), params)
        return optax.apply_updates(params, updates), opt_state

    # With `where` on every leaf XLA's CPU compiler would copy the state.
    return jax.lax.cond(finite, update, lambda *old: old, state.params, state.opt_state)
