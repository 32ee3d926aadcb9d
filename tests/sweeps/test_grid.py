"""The grid of a sweep: parsing, names of cells, rules and configs."""

import pytest

from dualsm.process.errors import UserError
from dualsm.sweeps.grid import (
    MAX_NAME_LENGTH,
    apply,
    make_cells,
    parse_axes,
    parse_axis,
    parse_cell,
    parse_rule,
)
from tests.micro import micro_config
from tests.micro_sources import two_sources


def test_values_are_numbers_fractions_or_text():
    assert parse_axis("alpha=0,1/64,0.5,1") == ("alpha", [0, 1 / 64, 0.5, 1])
    assert parse_axis("optimizer.learning_rate=1e-3,0.01") == ("optimizer.learning_rate", [1e-3, 0.01])
    assert parse_cell("optimizer.name=adamw,repetitions=4") == {"optimizer.name": "adamw", "repetitions": 4}


def test_cells_are_all_combinations_without_duplicates():
    cells = make_cells({"repetitions": [1, 4], "alpha": [0, 1 / 8, 1]}, more=[{"repetitions": 4, "alpha": 1}])
    assert [(c.values["repetitions"], c.values["alpha"]) for c in cells] == [
        (r, a) for r in (1, 4) for a in (0, 1 / 8, 1)
    ]
    assert len({cell.name for cell in cells}) == 6
    assert cells[1].name == "repetitions=1,alpha=0.125"


@pytest.mark.parametrize(
    "cells",
    [
        [{"objectives.causal.weight": 2}, {"objectives.masked_diffusion.weight": 2}],
        [{"optimizer.learning_rate": 0.12345671}, {"optimizer.learning_rate": 0.12345672}],
        [{"mixture_schedule.path": path} for path in ("a b", "a_b", "a/b", "a;b", "a%20b", "a:b")],
        [{"mixture_schedule.path": "a,steps=2"}, {"mixture_schedule.path": "a", "steps": 2}],
        [{"mixture_schedule.path": "x" * 300 + end} for end in "ab"],
    ],
)
def test_different_values_have_different_names(cells):
    names = [cell.name for cell in make_cells({}, more=cells)]
    assert len(set(names)) == len(cells)
    assert all(len(name.encode()) <= MAX_NAME_LENGTH and "/" not in name for name in names)


def test_equal_numbers_have_one_name():
    cells = make_cells({}, more=[{"alpha": 1, "steps": 1000000}, {"alpha": 1.0, "steps": 1e6}])
    assert [cell.name for cell in cells] == ["alpha=1,steps=1000000"]


def test_a_repeated_key_raises():
    with pytest.raises(UserError, match="^--grid: 'alpha' is given 2 times"):
        parse_axes(["alpha=0,1", "steps=4", "alpha=1/2"])
    with pytest.raises(UserError, match="^--cell: 'alpha=0,alpha=1': 'alpha' is given 2 times"):
        parse_cell("alpha=0,alpha=1")


def test_a_rule_sets_values_unless_an_axis_sets_them():
    rule = parse_rule("repetitions=64,128: optimizer.learning_rate=0.005")
    cells = make_cells({"repetitions": [1, 64], "alpha": [1]}, [rule])
    assert [cell.values.get("optimizer.learning_rate") for cell in cells] == [None, 0.005]
    swept = make_cells({"repetitions": [64], "optimizer.learning_rate": [0.1]}, [rule])
    assert swept[0].values["optimizer.learning_rate"] == 0.1


def test_a_cell_changes_only_its_own_values():
    config = micro_config()
    changed = apply(config, {"repetitions": 4, "alpha": 0.25, "optimizer.weight_decay": 1})
    assert (changed.repetitions, changed.optimizer.weight_decay) == (4, 1)
    assert {name: share for name, share in changed.mixture.items() if share} == {
        "causal": 0.25,
        "masked_diffusion": 0.75,
    }
    changed.repetitions, changed.optimizer.weight_decay = config.repetitions, config.optimizer.weight_decay
    changed.mixture = config.mixture
    assert changed.to_dict() == config.to_dict()
    assert config.to_dict() == micro_config().to_dict()


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (parse_axis, "repetitions"), (parse_axis, "=1"), (parse_axis, "a=1,"), (parse_axis, "a=,1"),
        (parse_cell, "a=1,b"), (parse_cell, "a=1, b= "), (parse_rule, "a=1,b=2"), (parse_rule, "a=1,: b=2"),
    ],
)  # fmt: skip
def test_malformed_flags_raise(read, text):
    flag = {parse_axis: "grid", parse_cell: "cell", parse_rule: "rule"}[read]
    with pytest.raises(UserError, match=f"^--{flag}: .*is not of the form"):
        read(text)


@pytest.mark.parametrize("text", ["l/8", "1/0", "1e400x", "9" * 400, "9" * 400 + "/1"])
def test_an_invalid_alpha_raises(text):
    with pytest.raises(UserError, match="alpha="):
        apply(micro_config(), {"alpha": parse_axis(f"alpha={text}")[1][0]})


@pytest.mark.parametrize(
    "values", [{"repetition": 4}, {"optimizer.rate": 1}, {"seed.x": 1}, {"steps": "many"}]
)
def test_unknown_keys_and_wrong_types_raise(values):
    with pytest.raises(UserError, match=next(iter(values))):
        apply(micro_config(), values)


@pytest.mark.parametrize("key", ["objectives.causal.wieght", "pairs.mir.casual", "mixture.casual"])
def test_the_error_of_an_unknown_key_names_the_list_of_its_section(key):
    with pytest.raises(UserError) as caught:
        apply(micro_config(), {key: 1.0})
    assert str(caught.value).startswith(f"unknown config key {key!r} in the grid; ")
    assert "docs/objectives.md for those of mixture, objectives and pairs" in str(caught.value)


def test_alpha_is_rejected_if_every_source_has_its_own_mixture():
    config = two_sources()
    assert apply(config, {"alpha": 0.5, "sources.small.share": 0.5}).sources.small.share == 0.5
    config.sources.large.mixture.causal = 1.0
    with pytest.raises(UserError, match="alpha=0.5 has no effect, because every source has its own mixture"):
        apply(config, {"alpha": 0.5})
