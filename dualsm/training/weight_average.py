"""Exponential moving average of the weights (`config.ema`), part of the train state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections


def update_average(config: ml_collections.ConfigDict, average: dict, params: dict, step: jax.Array) -> dict:
    """Returns the average after a step.

    Up to step `start` the average is the weights. After it, at multiples of `every`, it becomes
    decay * average + (1 - decay) * weights, in float32.

    Args:
      config: `config.ema`.
      average: average before the step.
      params: parameters after the step.
      step: int32 []; number of finished steps.
    """
    copies = step <= config.start

    def update(average: dict) -> dict:
        return jax.tree.map(
            lambda a, p: jnp.where(copies, p, config.decay * a + (1 - config.decay) * p), average, params
        )

    if config.every == 1:
        return update(average)
    return jax.lax.cond(copies | (step % config.every == 0), update, lambda average: average, average)
