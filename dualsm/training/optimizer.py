"""The table of optimizers."""

from __future__ import annotations

import jax
import ml_collections
import optax

from dualsm.training.adamw import make_adamw
from dualsm.training.muon import make_muon, uses_muon
from dualsm.training.weight_decay import is_scheduled, scheduled_weight_decay

# config.optimizer.name -> function (config.optimizer, schedule) -> optimizer
OPTIMIZERS = {"muon": make_muon, "adamw": make_adamw}


def make_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule, steps: int = 1
) -> optax.GradientTransformation:
    """Returns the optimizer of a run, with gradient clipping if `config.max_grad_norm` is not 0.

    Args:
      config: `config.optimizer`; `config.name` is a key of `OPTIMIZERS`.
      schedule: learning rate by step.
      steps: number of steps of the run, for weight decay that decreases linearly.
    """
    if is_scheduled(config):
        without = ml_collections.ConfigDict({**config, "weight_decay": 0.0})
        is_muon = uses_muon if config.name == "muon" else lambda names: False
        optimizer = optax.chain(
            OPTIMIZERS[config.name](without, schedule),
            scheduled_weight_decay(config, schedule, steps, is_muon),
        )
    else:
        optimizer = OPTIMIZERS[config.name](config, schedule)
    if config.max_grad_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)
    return optimizer


def at_step(state: optax.OptState, step: jax.Array) -> optax.OptState:
    """Sets the step of the schedules in an optimizer's state; Optax would count updates instead."""

    def set_count(part):
        return part._replace(count=step) if isinstance(part, optax.ScaleByScheduleState) else part

    return jax.tree.map(set_count, state, is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState))
