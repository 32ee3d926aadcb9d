"""AdamW."""

from __future__ import annotations

import ml_collections
import optax


def make_adamw(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW for all parameters.

    Args:
      config: `config.optimizer`.
      schedule: learning rate by step.
    """
    return optax.adamw(schedule, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay)
