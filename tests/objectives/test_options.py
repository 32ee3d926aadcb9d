"""Options of the objectives: their defaults in one voice, impossible ones refused."""

import inspect

import pytest

from dualsm.config import check_config, default_config
from dualsm.data.tokenizer import RESERVED_IDS
from dualsm.objectives.ahead import FARTHEST
from dualsm.objectives.mixture import OBJECTIVES
from dualsm.process.errors import UserError

from .conftest import SPECIAL


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_config_has_the_options_of_the_function_with_its_defaults(name):
    parameters = inspect.signature(OBJECTIVES[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    options = default_config().objectives[name].to_dict()
    assert options.pop("weight") == 1.0
    assert options == defaults


def test_every_objective_has_a_share():
    mixture = default_config().mixture
    assert set(mixture) == set(OBJECTIVES)
    assert {name for name, share in mixture.items() if share} == {"causal"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("causal.weight", -1.0),
        ("masked.first", 1.5),
        ("masked.keep", 0.95),  # with random 0.1
        ("masked.span", 0),
        ("variable_length_masked.low", 0.96),
        ("masked_input_causal.high", 0.1),
        ("diverse_causal.distance", 0),
        ("diverse_causal.distance", FARTHEST + 1),
        ("span_denoising.modes", ""),
        ("span_denoising.modes", "RQ"),
        ("span_denoising.modes", "RR"),
        ("masked_diffusion.time", "noon"),
        ("masked_diffusion.width", 0.0),
        ("masked_diffusion.clip", -1.0),
    ],
)
def test_impossible_options_are_refused_by_name(key, value):
    config = default_config()
    name, option = key.split(".")
    config.objectives[name][option] = value
    with pytest.raises(UserError, match=f"config.objectives.{name}.*{option}={value}|together"):
        check_config(config)


def test_a_bell_too_narrow_for_the_bound_is_refused():
    config = default_config()
    options = config.objectives.masked_diffusion
    options.width = 0.1  # harmless while the time is uniform
    check_config(config)
    options.time = "bell"
    with pytest.raises(UserError, match=r"masked_diffusion.width=0.1 is too narrow .* at least 0.15"):
        check_config(config)
    options.importance = False
    check_config(config)


def test_possible_options_pass():
    config = default_config()
    config.objectives.masked_input_causal.low, config.objectives.masked_input_causal.high = 0.0, 0.5
    config.objectives.masked_diffusion.time = "bell"
    config.objectives.diverse_causal.distance = FARTHEST
    config.objectives.span_denoising.modes = "XS"
    check_config(config)


def test_every_special_id_is_reserved_and_means_one_thing():
    ids = SPECIAL.as_dict()
    assert sorted(ids.values()) == list(range(RESERVED_IDS))
    assert ids[f"ahead{FARTHEST}"] - ids["ahead2"] == FARTHEST - 2
