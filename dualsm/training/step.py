"""One training step, a pure function of the state and a batch of packed rows.

rows -> [mixture: rewrite by objective] -> examples -> [model, loss: per microbatch] -> gradients
     -> one division by the whole batch's weight -> optimizer
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from dualsm.devices.sharding import constrain, platform, summed_over_devices
from dualsm.model import transformer
from dualsm.objectives import mixture
from dualsm.objectives.example import Example, Row, SpecialIds
from dualsm.training.objective_loss import example_loss
from dualsm.training.optimizer import at_step

SPIKE = 8.0  # a loss this many mean absolute deviations above the mean counts as a spike
SPIKE_AFTER = 50  # steps with an objective before its losses are compared with its statistics
SPIKE_GAP = 20  # steps without an objective after which its statistics start anew


class Batch(NamedTuple):
    """The rows of a step, B of them.

    Attributes:
      tokens_BxL1, documents_BxL1: int32; see `Row`.
      objective_B: int32; index of each row's objective among those of the run.
      stratum_B, strata_B: int32; see `Row`.
    """

    tokens_BxL1: jax.Array
    documents_BxL1: jax.Array
    objective_B: jax.Array
    stratum_B: jax.Array
    strata_B: jax.Array


class StepMetrics(NamedTuple):
    """What the log lines are made of, summed since the last one; J objectives, float32.

    Kept in the state so that a resumed run logs what an uninterrupted one logs. A step whose loss or
    gradient is no finite number leaves weights and optimizer as they were and adds to `skipped` alone;
    `skipped_in_row` counts such steps since the last good one, over log lines. `spike` is the loss a token
    of the last step where that was unusually high, else 0.
    """

    loss: jax.Array
    weight: jax.Array
    nll_J: jax.Array
    loss_denominator_J: jax.Array
    gradient_norm: jax.Array
    steps: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    spike: jax.Array


class LossStats(NamedTuple):
    """Running statistics of the loss of each of J objectives, for spike detection; float32.

    They are kept by objective so that a change of the mixture is not taken for a spike.

    Attributes:
      loss_J: mean of the loss per token over about 10 steps, nats.
      spread_J: mean over about 50 steps of the loss's absolute deviation from that mean, times the square
        root of the tokens that it is over; a step with more rows of an objective has less noise.
      steps_J: good steps with rows of the objective, since it was absent for `SPIKE_GAP` of them.
      absent_J: good steps since the last one with rows of the objective.
    """

    loss_J: jax.Array
    spread_J: jax.Array
    steps_J: jax.Array
    absent_J: jax.Array


class TrainState(NamedTuple):
    """All that a run carries from step to step. `step` counts finished steps, skipped updates included."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    sums: StepMetrics
    usual: LossStats


def init_state(
    config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation, objectives: int
) -> TrainState:
    """The state before the first step; everything in it follows from `config.seed`."""
    params = transformer.init_params(config.model, jax.random.key(config.seed))
    zero, zeros_J = jnp.float32(0), jnp.zeros(objectives)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        sums=StepMetrics(zero, zero, zeros_J, zeros_J, zero, zero, zero, zero, zero),
        usual=LossStats(zeros_J, zeros_J, zeros_J, zeros_J),
    )


def make_train_step(
    config: ml_collections.ConfigDict,
    names: Sequence[str],
    special: SpecialIds,
    optimizer: optax.GradientTransformation,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The step function, to be jitted with donation of the state.

    It returns the new state and, apart from it so that it can be read while the next step runs, its sums.

    Args:
      config: the run's config, vocabulary filled in.
      names: objectives that `Batch.objective_B` refers to.
      special: the tokenizer's special ids.
      optimizer: from `make_optimizer`.
    """
    objectives = mixture.bind(names, config.objectives, special)
    weight_J = jnp.array([config.objectives[name].weight for name in names], jnp.float32)

    def loss(params: dict, rows: tuple[Example, jax.Array]):
        example, weight_B = rows
        model = transformer.bind(config.model, params)
        weighted_sum, _, stats = example_loss(
            model, example, config.loss.chunk_size, config.loss.z_loss, weight_B
        )
        return weighted_sum, stats

    differentiate = jax.grad(loss, has_aux=True)

    def in_parts(params: dict, rows: tuple[Example, jax.Array]):
        def add(total, part):
            grads, stats = differentiate(params, part)
            return jax.tree.map(jnp.add, total, grads), stats

        parts = jax.tree.map(lambda a: _interleave(a, config.gradient_accumulation_steps), rows)
        grads, stats = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        return grads, jax.tree.map(_undo_interleave, stats)

    def gradients(params: dict, rows: tuple[Example, jax.Array]):
        """Returns gradients and statistics of all rows, accumulated where the config says so."""
        # On accelerators sums over devices of one layer hide behind the work of another.
        if config.gradient_accumulation_steps == 1 and platform() != "cpu":
            return differentiate(params, rows)
        return summed_over_devices(in_parts if config.gradient_accumulation_steps > 1 else differentiate)(
            params, rows
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        rows = batch.tokens_BxL1.shape[0]
        progress_B = jnp.full(rows, state.step / config.steps, jnp.float32)
        row = Row(batch.tokens_BxL1, batch.documents_BxL1, batch.stratum_B, batch.strata_B, progress_B)
        example = mixture.make_examples(objectives, row, batch.objective_B, mixture.row_keys(key, rows))
        example = jax.tree.map(lambda a: constrain(a, "batch", None), example)

        grads, stats = gradients(state.params, (example, weight_J[batch.objective_B]))
        weight = jnp.maximum(stats.loss_denominator_B.sum(), 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        gradient_norm = optax.global_norm(grads)
        finite = jnp.isfinite(gradient_norm) & jnp.isfinite(stats.nll_B.sum())

        def update(params: dict, opt_state: optax.OptState):
            # The learning rate is that of the step, however many updates were skipped before it.
            updates, opt_state = optimizer.update(grads, at_step(opt_state, state.step), params)
            return optax.apply_updates(params, updates), opt_state

        # By a branch, not leaf by leaf with `where`, for which XLA's CPU compiler copies the state.
        params, opt_state = jax.lax.cond(finite, update, lambda *old: old, state.params, state.opt_state)

        objective_BxJ = jax.nn.one_hot(batch.objective_B, len(names))
        new = StepMetrics(
            loss=(weight_J[batch.objective_B] * stats.nll_B).sum(),
            weight=stats.loss_denominator_B.sum(),
            # Not matrix products, which accelerators compute in reduced precision.
            nll_J=(stats.nll_B[:, None] * objective_BxJ).sum(0),
            loss_denominator_J=(stats.loss_denominator_B[:, None] * objective_BxJ).sum(0),
            gradient_norm=gradient_norm,
            steps=jnp.float32(1),
            skipped=jnp.float32(0),
            skipped_in_row=jnp.float32(0),
            spike=jnp.float32(0),
        )
        nothing = jax.tree.map(jnp.zeros_like, new)._replace(skipped=jnp.float32(1))
        new = _where(finite, new, nothing)
        kept = jnp.where(state.step % config.log.every == 0, 0.0, 1.0)
        sums = jax.tree.map(lambda old, add: kept * old + add, state.sums, new)
        usual, is_spike = update_loss_stats(state.usual, new.nll_J, new.loss_denominator_J)
        usual = _where(finite, usual, state.usual)
        in_row = jnp.where(finite, 0.0, state.sums.skipped_in_row + 1)
        spike = jnp.where(finite & is_spike, new.loss / jnp.maximum(new.weight, 1), 0.0)
        sums = sums._replace(skipped_in_row=in_row, spike=spike)
        return TrainState(state.step + 1, params, opt_state, sums, usual), sums

    return train_step


def update_loss_stats(
    usual: LossStats, nll_J: jax.Array, loss_denominator_J: jax.Array
) -> tuple[LossStats, jax.Array]:
    """Returns the statistics after a step, and True if its loss is a spike.

    A step is a spike when its loss lies above the one that it would have if the loss of each objective were
    `SPIKE` mean deviations above the mean. Objectives seen in fewer than `SPIKE_AFTER` steps are left out. In
    the statistics no loss counts as more than that limit, so that one spike does not hide the next.

    Args:
      usual: the statistics before the step.
      nll_J: weighted sum of nats of each objective's rows.
      loss_denominator_J: their loss denominators; 0 for an objective without rows.
    """
    present_J = loss_denominator_J > 0
    tokens_J = jnp.maximum(loss_denominator_J, 1)
    loss_J = nll_J / tokens_J
    steps_J = jnp.where(present_J & (usual.absent_J >= SPIKE_GAP), 0, usual.steps_J)
    known_J = present_J & (steps_J >= SPIKE_AFTER)
    limit_J = usual.loss_J + SPIKE * usual.spread_J / jnp.sqrt(tokens_J)
    is_spike = jnp.where(known_J, loss_denominator_J * (loss_J - limit_J), 0).sum() > 0

    loss_J = jnp.where(known_J, jnp.minimum(loss_J, limit_J), loss_J)
    steps_J = steps_J + 1
    mean_J = jnp.where(steps_J == 1, loss_J, usual.loss_J)
    deviation_J = loss_J - mean_J
    spread_J = jnp.where(steps_J == 1, 0, usual.spread_J)
    spread_J += (jnp.abs(deviation_J) * jnp.sqrt(tokens_J) - spread_J) / jnp.minimum(steps_J, 50)
    mean_J += deviation_J / jnp.minimum(steps_J, 10)
    seen = LossStats(mean_J, spread_J, steps_J, jnp.zeros_like(usual.absent_J))
    unseen = usual._replace(absent_J=usual.absent_J + 1)
    return _where(present_J, seen, unseen), is_spike


def _where(condition: jax.Array, yes, no):
    """One of two trees, leaf by leaf; what is not taken may hold any number."""
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)


def _interleave(a_Bx: jax.Array, parts: int) -> jax.Array:
    """[B, ...] as [parts, B/parts, ...], row b in part b % parts: every device keeps its own rows."""
    return jnp.moveaxis(a_Bx.reshape(-1, parts, *a_Bx.shape[1:]), 1, 0)


def _undo_interleave(a: jax.Array) -> jax.Array:
    return jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])
