"""Learning rates as functions of the step."""

from __future__ import annotations

import ml_collections
import optax

SCHEDULES = ("wsd", "cosine", "infinite")


def learning_rate(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate at each step, counted from 0.

    Every schedule rises linearly to the peak over `warmup` steps. Then

    - wsd: is constant, and falls linearly to `final` times the peak over the last `decay` of the run
      (arXiv 2405.18392);
    - cosine: falls as a cosine to `final` times the peak;
    - infinite: falls as a cosine to c = `constant` times the peak over `cooldown` steps, is constant, and
      over the last `decay` of the run, t_a steps from step N_d on, falls exponentially to m = `final` times
      the peak, c * (m / c)^((n - N_d) / t_a) (arXiv 2503.02844).

    Args:
      config: `config.optimizer`, with `learning_rate` (the peak) and `schedule`.
      steps: length of the run.
    """
    schedule, peak = config.schedule, config.learning_rate
    warmup, decay = schedule.warmup_steps, round(schedule.decay_fraction * steps)
    rise = optax.linear_schedule(0.0, peak, warmup)
    if schedule.name == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=schedule.final_fraction)
        return optax.join_schedules([rise, fall], [warmup])
    if schedule.name == "wsd":
        fall = optax.linear_schedule(peak, peak * schedule.final_fraction, max(1, decay))
        return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, steps - decay])
    # The cosine stays at its end value, which is the constant phase.
    cool = optax.cosine_decay_schedule(
        peak, max(1, schedule.cooldown_steps), alpha=schedule.constant_fraction
    )
    ratio = schedule.final_fraction / schedule.constant_fraction
    anneal = optax.exponential_decay(peak * schedule.constant_fraction, max(1, decay), ratio)
    return optax.join_schedules([rise, cool, anneal], [warmup, steps - decay])
