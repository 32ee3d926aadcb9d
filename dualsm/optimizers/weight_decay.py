"""Weight decay with a separate schedule and exempt parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import optax

SCHEDULES = ("learning_rate", "constant", "linear")
EXEMPTIBLE = ("embeddings", "output", "vectors")


def is_scheduled(config: ml_collections.ConfigDict) -> bool:
    """Returns False for AdamW's weight decay: all parameters, multiplied by the learning rate."""
    schedule = config.weight_decay_schedule
    return schedule.name != "learning_rate" or schedule.independent or bool(config.weight_decay_exempt)


def scheduled_weight_decay(
    config: ml_collections.ConfigDict,
    learning_rate: optax.Schedule,
    steps: int,
    peak_learning_rate: Callable[[Sequence[str]], float],
) -> optax.GradientTransformation:
    """Returns the transformation that subtracts weight decay from the updates of any optimizer.

    A step multiplies each parameter by 1 - weight_decay * f(step) * peak, where f is the learning rate
    divided by its peak, 1, or linear from 1 to `final_fraction`. `peak` is the peak learning rate of the
    parameter's optimizer, or 1 if `independent` is True (arXiv 2309.14322).

    Args:
      config: `config.optimizer`.
      learning_rate: learning rate by step.
      steps: number of steps of the run.
      peak_learning_rate: function from the path of a parameter to its peak learning rate.
    """
    schedule, exempt = config.weight_decay_schedule, config.weight_decay_exempt.split(",")
    factor = {
        "learning_rate": lambda step: learning_rate(step) / config.learning_rate,
        "constant": lambda step: 1.0,
        "linear": optax.linear_schedule(1.0, schedule.final_fraction, steps),
    }[schedule.name]

    def rate(path) -> float:
        names = [key.key for key in path]
        if (group := _group(names)) and group in exempt:
            return 0.0
        return config.weight_decay * (1.0 if schedule.independent else peak_learning_rate(names))

    def init(_):
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(updates, state, params):
        decay = factor(state.count)
        updates = jax.tree_util.tree_map_with_path(
            lambda path, update, param: update - decay * rate(path) * param if rate(path) else update,
            updates,
            params,
        )
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)


def _group(names: Sequence[str]) -> str:
    """Returns the group of a parameter that can be exempt, or "" for the other matrices."""
    if names[-1] in ("scale", "bias"):
        return "vectors"
    return {"embedding": "embeddings", "head/output": "output"}.get("/".join(names[:-1]), "")
