"""Metrics of training steps, summed between log lines, and detection of loss spikes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dualsm.training.objective_loss import RowSums

SPIKE = 8.0  # a loss this many mean absolute deviations above the mean counts as a spike
SPIKE_AFTER = 50  # steps with an objective before its losses are compared with its statistics
SPIKE_GAP = 20  # steps without an objective after which its statistics are reset


class StepMetrics(NamedTuple):
    """Sums over the steps since the last log line; float32, J objectives.

    The sums are part of the train state, so that a resumed run logs the same numbers as an uninterrupted run.
    A step whose loss or gradient is not finite adds to `skipped` only.

    Attributes:
      loss: weighted sum of nats, objective weights included.
      weight: loss denominator.
      nll_J: weighted sum of nats of each objective, objective weights excluded.
      loss_denominator_J: loss denominator of each objective.
      gradient_norm: sum of the gradient norms.
      steps: number of updates.
      skipped: number of skipped updates.
      consecutive_skips: skipped updates since the last update; not reset by a log line.
      spike: loss in nats per token of the last step if it is a spike, else 0.
    """

    loss: jax.Array
    weight: jax.Array
    nll_J: jax.Array
    loss_denominator_J: jax.Array
    gradient_norm: jax.Array
    steps: jax.Array
    skipped: jax.Array
    consecutive_skips: jax.Array
    spike: jax.Array


class LossStats(NamedTuple):
    """Running statistics of the loss of each of J objectives, for spike detection; float32.

    Each objective has its own statistics, so that a change of the mixture does not look like a spike.

    Attributes:
      loss_J: running mean of the loss over about 10 steps, nats per token.
      spread_J: running mean over about 50 steps of the absolute deviation from `loss_J`, times the square
        root of the number of tokens: the loss of a step with more tokens has less noise.
      steps_J: updates with rows of the objective since the statistics were reset.
      absent_J: updates since the last one with rows of the objective.
    """

    loss_J: jax.Array
    spread_J: jax.Array
    steps_J: jax.Array
    absent_J: jax.Array


def init_metrics(num_objectives: int) -> StepMetrics:
    """Returns metrics of no steps."""
    zero, zeros_J = jnp.float32(0), jnp.zeros(num_objectives)
    return StepMetrics(zero, zero, zeros_J, zeros_J, zero, zero, zero, zero, zero)


def init_loss_stats(num_objectives: int) -> LossStats:
    """Returns statistics of no steps."""
    zeros_J = jnp.zeros(num_objectives)
    return LossStats(zeros_J, zeros_J, zeros_J, zeros_J)


def step_metrics(
    stats: RowSums,
    objective_B: jax.Array,
    weight_B: jax.Array,
    denominator: jax.Array,
    gradient_norm: jax.Array,
    num_objectives: int,
) -> StepMetrics:
    """Returns the metrics of one step, assuming that its numbers are finite.

    Args:
      stats: loss sums of the B rows.
      objective_B: int32; index of each row's objective.
      weight_B: factor on each row's nats in the loss.
      denominator: loss denominator of the batch.
      gradient_norm: global norm of the gradient.
      num_objectives: J.
    """
    objective_BxJ = jax.nn.one_hot(objective_B, num_objectives)
    return StepMetrics(
        loss=(weight_B * stats.nll_B).sum(),
        weight=denominator,
        # Not matrix products, which accelerators compute in reduced precision.
        nll_J=(stats.nll_B[:, None] * objective_BxJ).sum(0),
        loss_denominator_J=(stats.loss_denominator_B[:, None] * objective_BxJ).sum(0),
        gradient_norm=gradient_norm,
        steps=jnp.float32(1),
        skipped=jnp.float32(0),
        consecutive_skips=jnp.float32(0),
        spike=jnp.float32(0),
    )


def accumulate_metrics(
    metrics: StepMetrics, loss_stats: LossStats, new: StepMetrics, finite: jax.Array, restart: jax.Array
) -> tuple[StepMetrics, LossStats]:
    """Adds the metrics of a step and updates the loss statistics.

    Args:
      metrics: sums before the step.
      loss_stats: statistics before the step.
      new: metrics of the step.
      finite: bool []; False if the update was skipped.
      restart: bool []; True if a log line was due after the previous step, so that the sums start at zero.
    """
    skip = jax.tree.map(jnp.zeros_like, new)._replace(skipped=jnp.float32(1))
    new = _tree_where(finite, new, skip)
    keep = jnp.where(restart, 0.0, 1.0)
    sums = jax.tree.map(lambda old, add: keep * old + add, metrics, new)
    updated, is_spike = update_loss_stats(loss_stats, new.nll_J, new.loss_denominator_J)
    consecutive_skips = jnp.where(finite, 0.0, metrics.consecutive_skips + 1)
    spike = jnp.where(finite & is_spike, new.loss / jnp.maximum(new.weight, 1), 0.0)
    sums = sums._replace(consecutive_skips=consecutive_skips, spike=spike)
    return sums, _tree_where(finite, updated, loss_stats)


def update_loss_stats(
    loss_stats: LossStats, nll_J: jax.Array, loss_denominator_J: jax.Array
) -> tuple[LossStats, jax.Array]:
    """Updates the statistics with the losses of a step and detects a spike.

    The step's loss is a spike if it exceeds the loss that the step would have if every objective were `SPIKE`
    mean deviations above its mean. Objectives seen in fewer than `SPIKE_AFTER` steps are ignored. Losses are
    clipped to that limit before they enter the statistics, so that one spike does not hide the next.

    Args:
      loss_stats: statistics before the step.
      nll_J: weighted sum of nats of each objective's rows.
      loss_denominator_J: loss denominators; 0 for an objective without rows.

    Returns:
      The new statistics, and a bool [] that is True for a spike.
    """
    present_J = loss_denominator_J > 0
    tokens_J = jnp.maximum(loss_denominator_J, 1)
    loss_J = nll_J / tokens_J
    steps_J = jnp.where(present_J & (loss_stats.absent_J >= SPIKE_GAP), 0, loss_stats.steps_J)
    known_J = present_J & (steps_J >= SPIKE_AFTER)
    limit_J = loss_stats.loss_J + SPIKE * loss_stats.spread_J / jnp.sqrt(tokens_J)
    is_spike = jnp.where(known_J, loss_denominator_J * (loss_J - limit_J), 0).sum() > 0

    loss_J = jnp.where(known_J, jnp.minimum(loss_J, limit_J), loss_J)
    steps_J = steps_J + 1
    mean_J = jnp.where(steps_J == 1, loss_J, loss_stats.loss_J)
    deviation_J = loss_J - mean_J
    spread_J = jnp.where(steps_J == 1, 0, loss_stats.spread_J)
    spread_J += (jnp.abs(deviation_J) * jnp.sqrt(tokens_J) - spread_J) / jnp.minimum(steps_J, 50)
    mean_J += deviation_J / jnp.minimum(steps_J, 10)
    seen = LossStats(mean_J, spread_J, steps_J, jnp.zeros_like(loss_stats.absent_J))
    unseen = loss_stats._replace(absent_J=loss_stats.absent_J + 1)
    return _tree_where(present_J, seen, unseen), is_spike


def _tree_where(condition: jax.Array, yes, no):
    """Selects between two trees leaf by leaf."""
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)
