"""The table of optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import ml_collections
import optax

from dualsm.optimizers.adamw import make_adamw
from dualsm.optimizers.muon import make_muon, muon_peak
from dualsm.optimizers.weight_decay import is_scheduled, scheduled_weight_decay
from dualsm.process.errors import UserError


class Optimizer(NamedTuple):
    """A row of the table of optimizers.

    Attributes:
      make: function (config.optimizer, learning rate by step) -> optimizer.
      peak_learning_rate: function (config.optimizer, path of a parameter) -> peak learning rate.
    """

    make: Callable[[ml_collections.ConfigDict, optax.Schedule], optax.GradientTransformation]
    peak_learning_rate: Callable[[ml_collections.ConfigDict, Sequence[str]], float] = lambda config, path: (
        config.learning_rate
    )


# The keys are the values of config.optimizer.name.
OPTIMIZERS = {"muon": Optimizer(make_muon, muon_peak), "adamw": Optimizer(make_adamw)}


def make_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule, steps: int
) -> optax.GradientTransformation:
    """Returns the optimizer of a run, with gradient clipping if `config.max_grad_norm` is not 0.

    Args:
      config: `config.optimizer`; `config.name` is a key of `OPTIMIZERS`.
      schedule: learning rate by step.
      steps: number of steps of the run, for weight decay that decreases linearly.
    """
    row = OPTIMIZERS[config.name]
    if is_scheduled(config):
        without = ml_collections.ConfigDict({**config, "weight_decay": 0.0})
        peak = functools.partial(row.peak_learning_rate, config)
        decay = scheduled_weight_decay(config, schedule, steps, peak)
        optimizer = optax.chain(row.make(without, schedule), decay)
    else:
        optimizer = row.make(config, schedule)
    if config.max_grad_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)
    return optimizer


def at_step(state: optax.OptState, step: jax.Array) -> optax.OptState:
    """Sets the step of the schedules in an optimizer's state; Optax would count updates instead."""

    def set_count(part):
        return part._replace(count=step) if isinstance(part, optax.ScaleByScheduleState) else part

    return jax.tree.map(set_count, state, is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState))


def check_optimizer(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` if keys of `config.optimizer` do not fit together."""
    if config.adamw_learning_rate and config.name != "muon":
        raise UserError(
            f"config.optimizer.adamw_learning_rate={config.adamw_learning_rate} has no effect with "
            f"config.optimizer.name={config.name}; set config.optimizer.learning_rate"
        )
