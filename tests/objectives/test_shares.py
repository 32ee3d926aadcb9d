"""Shares of the objectives over the run."""

import numpy as np
import pytest

from dualsm.config import check_config
from dualsm.objectives.shares import points, set_phases, step_shares, trained_objectives
from dualsm.process.errors import UserError
from tests.micro import micro_config

NAMES = ["causal", "masked_diffusion"]


def scheduled(name: str, path: str, steps: int = 100, **shares):
    config = micro_config()
    config.steps = steps
    for objective in config.mixture:
        config.mixture[objective] = shares.get(objective, 0.0)
    config.mixture_schedule.name, config.mixture_schedule.path = name, path
    return config


def test_constant_shares_are_the_mixture_at_every_step():
    shares_SxJ = step_shares(scheduled("constant", "", causal=0.75, masked_diffusion=0.25), NAMES)
    assert shares_SxJ.shape == (100, 2)
    assert (shares_SxJ == [0.75, 0.25]).all()


def test_linear_shares_interpolate_and_are_constant_after_the_last_point():
    config = scheduled("linear", "0.5 causal=0.5 masked_diffusion=0.5; 0.75 masked_diffusion=1", causal=1.0)
    causal_S = step_shares(config, NAMES)[:, 0]
    np.testing.assert_allclose(np.diff(causal_S[:50]), -0.01, atol=1e-12)
    np.testing.assert_allclose(np.diff(causal_S[51:75]), -0.02, atol=1e-12)
    assert causal_S[0] == pytest.approx(0.995)
    assert (causal_S[76:] == 0).all()
    assert step_shares(config, NAMES).sum(1) == pytest.approx(1)


def test_mean_share_of_a_linear_schedule_is_the_mean_of_its_ends():
    config = scheduled("linear", "1 masked_diffusion=1", steps=7, causal=1.0)
    assert step_shares(config, NAMES)[:, 0].mean() == pytest.approx(0.5)


def test_steps_keep_the_shares_until_the_next_point():
    config = scheduled("steps", "0.25 masked_diffusion=1; 0.5 causal=1", steps=8, causal=1.0)
    assert step_shares(config, NAMES)[:, 0].tolist() == [1, 1, 0, 0, 1, 1, 1, 1]


def test_phases_of_whole_epochs_change_between_epochs():
    """AntLM's alternation: with R repetitions in S steps, epoch k begins with step k * S / R."""
    config = scheduled("constant", "", steps=48, causal=1.0)
    set_phases(config, [(1, {"causal": 1.0}), (4, {"masked_diffusion": 1.0}), (1, {"causal": 1.0})])
    check_config(config)
    causal_S = step_shares(config, NAMES)[:, 0]
    assert causal_S.tolist() == [1] * 8 + [0] * 32 + [1] * 8


def test_phases_keep_the_exact_shares():
    thirds = dict.fromkeys([*NAMES, "prefix"], 1 / 3)
    config = scheduled("constant", "", steps=7, causal=1.0)
    set_phases(config, [(1, {"causal": 1.0}), (6, thirds)])
    check_config(config)
    _, second = points(config)
    assert second.shares == thirds and second.progress == 1 / 7
    assert step_shares(config, NAMES)[:, 0].tolist() == [1.0] + [1 / 3] * 6


def test_objectives_of_later_points_are_trained():
    config = scheduled("steps", "0.5 prefix=1", causal=1.0)
    assert trained_objectives(config) == ["causal", "prefix"]


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("linear", "", "needs a path"),
        ("constant", "1 causal=1", "has no effect with the schedule 'constant'"),
        ("steps", "0.5 causal=0.4 prefix=0.5", "sums to 0.9"),
        ("steps", "0.5 causal=1; 0.5 prefix=1", "must be above 0.5"),
        ("steps", "1.5 causal=1", "at most 1"),
        ("steps", "half causal=1", "cannot parse"),
        ("steps", "0.5 causal", "cannot parse"),
        ("steps", "0.5 causal=1 causal=0.5 prefix=0.5", "a name occurs twice"),
        ("linear", "0.5 casual=1", "unknown objective"),
    ],
)
def test_invalid_schedules_are_rejected_in_one_line(name, path, message):
    with pytest.raises(UserError, match=message) as error:
        check_config(scheduled(name, path, causal=1.0))
    assert "\n" not in str(error.value)
