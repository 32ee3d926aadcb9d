"""The table of objectives: derived config keys and docs, and checks of options."""

import pytest

from dualsm.config import check_config, default_config
from dualsm.data.tokenizer import RESERVED_IDS, SPECIAL_PIECES
from dualsm.objectives import tables
from dualsm.objectives.ahead import MAX_DISTANCE
from dualsm.objectives.registry import OBJECTIVES, Option, objective, valid_options
from dualsm.process.errors import UserError
from tests.conftest import ROOT

VIEW = {"view": "causal", "sees": "", "predicts": "", "averages_over": ""}


@pytest.fixture
def table():
    """Restores the table of objectives after the test."""
    before = dict(OBJECTIVES)
    yield OBJECTIVES
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


def test_a_new_objective_needs_one_function(table):
    """A decorated function gets its share, options and weight in the config, checks and rows in the docs."""

    @objective(
        order=100,
        **VIEW,
        mode_tokens={"new": 15},
        far=Option("A distance.", table["masked"].options["span"].rule),
    )
    def telepathy(row, key, special, far: int = 2):
        """Predicts by telepathy."""

    config = default_config()
    assert config.mixture.telepathy == 0.0
    assert config.objectives.telepathy.to_dict() == {"weight": 1.0, "far": 2}
    config.objectives.telepathy.far = 0
    with pytest.raises(UserError, match=r"config.objectives.telepathy.far=0 must be at least 1"):
        check_config(config)
    assert list(table)[-1] == "telepathy"
    assert "| `telepathy` |" in tables.objectives_table()
    assert "| `far` | `2` | at least 1 | A distance. |" in tables.options_table("telepathy")
    assert "| 15 | `new` | `telepathy` |" in tables.mode_tokens_table()


def test_objectives_with_the_same_mode_token_cannot_be_mixed(table):
    @objective(order=100, **VIEW, mode_tokens={"new": table["next_all"].mode_tokens["rest"]})
    def telepathy(row, key, special):
        """Predicts by telepathy."""

    config = default_config()
    config.mixture.causal, config.mixture.telepathy = 0.5, 0.5
    check_config(config)
    config.mixture.causal, config.mixture.next_all = 0.0, 0.5
    with pytest.raises(UserError, match="next_all and telepathy use the reserved id 9 .*train only one"):
        check_config(config)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"near": Option("")}, TypeError),
        ({"order": 0}, ValueError),
        ({"mode_tokens": {"new": RESERVED_IDS}}, ValueError),
        ({"mode_tokens": {"new": len(SPECIAL_PIECES) - 1}}, ValueError),
    ],
)
def test_a_faulty_registration_is_rejected(table, changes, error):
    with pytest.raises(error):
        objective(**{"order": 100, **VIEW, "far": Option(""), **changes})(
            lambda row, key, special, far=1: None
        )
    assert len(table) == 10


def test_registered_objectives_use_different_mode_tokens():
    ids = [token for row in OBJECTIVES.values() for token in row.mode_tokens.values()]
    assert sorted(ids) == list(range(len(SPECIAL_PIECES), RESERVED_IDS))


def test_the_order_never_changes():
    """The order decides how rows are rounded, so a new order would change the data of resumed runs."""
    assert list(OBJECTIVES) == [
        "causal", "prefix", "masked_diffusion", "masked", "variable_length_masked", "diverse_causal",
        "masked_input_causal", "span_denoising", "next_all", "block_diffusion",
    ]  # fmt: skip


def test_the_default_mixture_is_causal():
    mixture = default_config().mixture
    assert set(mixture) == {*OBJECTIVES, "mir", "nemotron"}
    assert {name for name, share in mixture.items() if share} == {"causal"}


def test_validation_keeps_only_the_options_that_define_the_task():
    options = default_config().objectives
    options.diverse_causal.distance, options.masked_diffusion.clip = 2, 3.0
    assert {name: values for name, values in valid_options(options).items() if values} == {
        "block_diffusion": {"block": 32, "form": "noisy"},
        "diverse_causal": {"distance": 2},
        "masked_diffusion": {"shifted": True},
        "span_denoising": {"modes": "RSX"},
    }


def test_the_docs_contain_the_tables():
    """To update docs/objectives.md, paste the output of `python -m dualsm.objectives.tables`."""
    text = (ROOT / "docs" / "objectives.md").read_text()
    assert tables.objectives_table() in text
    assert tables.mode_tokens_table() in text
    for name, row in OBJECTIVES.items():
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert not row.options or tables.options_table(name) in section


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("causal.weight", -1.0),
        ("masked.first", 1.5),
        ("masked.keep", 0.95),  # with random=0.1
        ("masked.span", 0),
        ("variable_length_masked.low", 0.96),
        ("masked_input_causal.high", 0.1),
        ("diverse_causal.distance", 0),
        ("diverse_causal.distance", MAX_DISTANCE + 1),
        ("span_denoising.modes", ""),
        ("span_denoising.modes", "RQ"),
        ("span_denoising.modes", "RR"),
        ("masked_diffusion.time", "noon"),
        ("masked_diffusion.width", 0.0),
        ("masked_diffusion.clip", -1.0),
        ("block_diffusion.block", -1),
        ("block_diffusion.form", "clean"),
    ],
)
def test_invalid_options_are_rejected_by_name(key, value):
    config = default_config()
    name, option = key.split(".")
    config.objectives[name][option] = value
    with pytest.raises(UserError, match=f"config.objectives.{name}.*{option}={value}"):
        check_config(config)


def test_a_bell_too_narrow_for_the_bound_is_rejected():
    config = default_config()
    options = config.objectives.masked_diffusion
    options.width = 0.1  # no effect with the uniform distribution
    check_config(config)
    options.time = "bell"
    with pytest.raises(UserError, match=r"masked_diffusion: width=0.1 is too narrow .* at least 0.15"):
        check_config(config)
    options.importance = False
    check_config(config)


def test_valid_options_pass():
    config = default_config()
    config.objectives.masked_input_causal.low, config.objectives.masked_input_causal.high = 0.0, 0.5
    config.objectives.masked_diffusion.time = "bell"
    config.objectives.diverse_causal.distance = MAX_DISTANCE
    config.objectives.span_denoising.modes = "XS"
    config.objectives.block_diffusion.block, config.objectives.block_diffusion.form = 0, "tail"
    check_config(config)
