"""Learning-rate schedules at the boundaries of their phases."""

import contextlib

import pytest

from dualsm.config import default_config
from dualsm.optimizers.schedules import check_schedule, learning_rate
from dualsm.process.errors import UserError


def schedule(steps=100, **values):
    config = default_config().lock().optimizer
    config.learning_rate = 1.0
    config.schedule.update(values)
    return learning_rate(config, steps)


def test_phases_of_wsd():
    rate = schedule(name="wsd", warmup_steps=10, decay_fraction=0.25, final_fraction=0.1)
    assert float(rate(0)) == 0.0
    assert float(rate(5)) == pytest.approx(0.5)
    assert {float(rate(step)) for step in range(10, 76)} == {1.0}
    assert float(rate(76)) < 1.0
    assert float(rate(100)) == pytest.approx(0.1)
    assert float(rate(88)) == pytest.approx(1 - 0.9 * 13 / 25, abs=1e-6)


def test_wsd_without_warmup_starts_at_the_peak():
    assert float(schedule(name="wsd", warmup_steps=0)(0)) == 1.0


def test_cosine_ends_at_final_fraction():
    rate = schedule(name="cosine", warmup_steps=10, final_fraction=0.2)
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(55)) == pytest.approx(0.6, abs=1e-3)
    assert float(rate(100)) == pytest.approx(0.2)


def test_phases_of_infinite():
    """Linear to the peak over N_w, cosine to const over N_c, hold, const * (min/const)^((n - N_d)/t_a)."""
    rate = schedule(
        name="infinite",
        warmup_steps=10,
        cooldown_steps=20,
        constant_fraction=0.4,
        decay_fraction=0.5,
        final_fraction=0.1,
    )
    assert float(rate(5)) == pytest.approx(0.5)
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(20)) == pytest.approx(0.7)  # halfway through the cosine decay
    assert {round(float(rate(step)), 6) for step in range(30, 51)} == {0.4}
    for step in (60, 75, 99):
        assert float(rate(step)) == pytest.approx(0.4 * (0.1 / 0.4) ** ((step - 50) / 50), rel=1e-5)


def test_infinite_without_decay_stays_constant():
    rate = schedule(name="infinite", cooldown_steps=20, constant_fraction=0.4, decay_fraction=0.0)
    assert {round(float(rate(step)), 6) for step in range(20, 101)} == {0.4}


@pytest.mark.parametrize(
    ("decay", "final", "constant", "valid"),
    [(0.0, 0.0, 0.5, True), (0.25, 0.1, 0.5, True), (0.25, 0.0, 0.5, False), (0.25, 0.6, 0.5, False)],
)
def test_the_decay_of_infinite_ends_above_zero(decay, final, constant, valid):
    config = default_config().lock().optimizer
    config.schedule.update(
        name="infinite", decay_fraction=decay, final_fraction=final, constant_fraction=constant
    )
    message = "0 < final_fraction <= constant_fraction"
    with contextlib.nullcontext() if valid else pytest.raises(UserError, match=message):
        check_schedule(config.schedule, 100)
