"""Learning rates as functions of the step."""

from __future__ import annotations

import ml_collections
import optax

SCHEDULES = ("wsd", "cosine")


def learning_rate(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate at each step, counted from 0.

    Args:
      config: `config.optimizer`, with `learning_rate` (the peak) and `schedule`:
        wsd: linear warmup over `warmup` steps, constant, linear decay to `final` times the peak over the
          last `decay` of the run (arXiv 2405.18392).
        cosine: linear warmup, then a cosine from the peak to `final` times the peak.
      steps: length of the run.
    """
    schedule, peak = config.schedule, config.learning_rate
    rise = optax.linear_schedule(0.0, peak, schedule.warmup)
    if schedule.name == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(1, steps - schedule.warmup), alpha=schedule.final)
        return optax.join_schedules([rise, fall], [schedule.warmup])
    decay = round(schedule.decay * steps)
    hold = optax.constant_schedule(peak)
    fall = optax.linear_schedule(peak, peak * schedule.final, max(1, decay))
    return optax.join_schedules([rise, hold, fall], [schedule.warmup, steps - decay])
