"""Learning-rate schedules."""

from __future__ import annotations

import ml_collections
import optax

from dualsm.process.errors import UserError

SCHEDULES = ("wsd", "cosine", "infinite")


def learning_rate(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    Every schedule starts with `warmup_steps` of linear warmup to the peak. The next phases are:

    - wsd (warmup-stable-decay): constant, then linear decay to `final_fraction` of the peak over the last
      `decay_fraction` of the steps (arXiv 2405.18392).
    - cosine: cosine decay to `final_fraction` of the peak.
    - infinite: cosine decay to c = `constant_fraction` of the peak over `cooldown_steps`, then constant, then
      exponential decay to m = `final_fraction` of the peak over the last `decay_fraction` of the steps. At
      step n of this last phase, which has t_a steps from step N_d on, the learning rate is
      c * (m / c)^((n - N_d) / t_a) (arXiv 2503.02844).

    Args:
      config: `config.optimizer`, with `learning_rate` (the peak) and `schedule`.
      steps: number of steps of the run.
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
    # After its decay the cosine schedule keeps its last value, which makes the constant phase.
    cool = optax.cosine_decay_schedule(
        peak, max(1, schedule.cooldown_steps), alpha=schedule.constant_fraction
    )
    ratio = schedule.final_fraction / schedule.constant_fraction
    anneal = optax.exponential_decay(peak * schedule.constant_fraction, max(1, decay), ratio)
    return optax.join_schedules([rise, cool, anneal], [warmup, steps - decay])


def check_schedule(schedule: ml_collections.ConfigDict, steps: int) -> None:
    """Raises `UserError` if the phases of `config.optimizer.schedule` do not fit into a run of `steps`."""
    decay = round(schedule.decay_fraction * steps) if schedule.name != "cosine" else 0
    cooldown = schedule.cooldown_steps if schedule.name == "infinite" else 0
    if schedule.warmup_steps + cooldown + decay > steps:
        raise UserError(
            f"config.optimizer.schedule: warmup ({schedule.warmup_steps}), cooldown ({cooldown}) and decay "
            f"({decay}) together exceed config.steps={steps}; shorten one of them"
        )
    if schedule.name != "infinite":
        return
    final, constant = schedule.final_fraction, schedule.constant_fraction
    if not 0 <= final <= constant <= 1 or constant == 0 or (decay and final == 0):
        raise UserError(
            f"config.optimizer.schedule: final_fraction={final} and constant_fraction={constant} must "
            "satisfy 0 < final_fraction <= constant_fraction <= 1 for the infinite schedule; final_fraction "
            "may be 0 with decay_fraction=0, for a run whose forks decay"
        )
