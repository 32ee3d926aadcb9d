"""The CSV table comes back as it was, and only cells that can be compared are."""

import math

import pytest

from dualsm.analysis.analysis_errors import TooFewCells
from dualsm.analysis.table import (
    comparable,
    drawable,
    load,
    lower_is_better,
    measures,
    on_same_tokens,
    read_table,
    seed_groups,
    seed_sd,
    unequal_tuning,
    usable,
    write_table,
)
from dualsm.process.errors import UserError
from dualsm.sweeps.cells import collect
from tests.analysis.synthetic import grid, write_sweep

LOSS = "valid/causal/loss"


def row(repetitions=1, alpha=0.5, loss=3.0, budget=1024, status="done", **more):
    fixed = {"name": "x", "status": status, "repetitions": repetitions, "alpha": alpha, "seed": 0}
    return fixed | {"budget_tokens": budget, LOSS: loss} | more


def without_missing(rows):
    return [{name: value for name, value in r.items() if value is not None} for r in rows]


def test_values_come_back_with_their_types(tmp_path):
    values = [
        0, 1, -7, 10**18, 0.1, 1 / 3, 1e-300, 1.0, True, False, "", "text", "1", "1.5", "true", "null", "NaN",
        '"', "a,b", "two\nlines", "a\r\nb", " 3", "μ", "[1]", [1, 2.5], {"a": 1}, None,
    ]  # fmt: skip
    rows = [row(value=value, name=f"{number}") for number, value in enumerate(values)]
    write_table(tmp_path / "t.csv", rows)
    back = read_table(tmp_path / "t.csv")
    assert back == rows
    assert [type(r["value"]) for r in back] == [type(value) for value in values]
    assert "value" in back[0]
    assert list(tmp_path.iterdir()) == [tmp_path / "t.csv"]


def test_rows_with_other_columns(tmp_path):
    rows = [row(a=1), row(b=2.5), row(LOSS=None)]
    write_table(tmp_path / "t.csv", rows)
    assert without_missing(read_table(tmp_path / "t.csv")) == without_missing(rows)


def test_a_sweep_comes_back(tmp_path):
    write_sweep(tmp_path, grid([1, 4], [0, 1 / 64, 1]), missing=("later",))
    rows = load(tmp_path)
    assert rows == collect(tmp_path)
    write_table(tmp_path / "table.csv", rows)
    back = load(tmp_path / "table.csv")
    assert without_missing(back) == without_missing(rows)
    assert list(back[0])[:3] == ["name", "status", "reason"]


BAD = {
    "empty": ("", "status"),
    "another table": ("a,b\n1,2\n", "no column"),
    "ragged": ("status,repetitions,alpha,budget_tokens\ndone,1\n", "row 2: 2 values for 4 columns"),
    "no number": ("status,repetitions,alpha,budget_tokens\ndone,many,1,5\n", "repetitions='many'"),
    "no share": ("status,repetitions,alpha,budget_tokens\ndone,1,1.5,5\n", "alpha=1.5"),
    "no repetition": ("status,repetitions,alpha,budget_tokens\ndone,0,1,5\n", "repetitions=0"),
    "binary": (b"\xff\xfe\x00", "no CSV table"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_one_line(tmp_path, case):
    content, expected = BAD[case]
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"t\.csv") as error:
        read_table(path)
    assert expected in str(error.value)
    with pytest.raises(UserError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_only_finished_cells_of_one_budget_are_compared():
    good = [row(alpha=a) for a in (0, 0.5, 1)]
    bad = [row(status=s) for s in ("running", "failed", "diverged", "missing", "damaged")]
    bad += [row(alpha=None), row(loss=None), row(loss=math.nan), row(budget=512), row(budget=None)]
    assert comparable(bad[::-1] + good, LOSS) == good


def test_of_equally_frequent_budgets_the_larger_counts():
    rows = [row(budget=512), row(budget=1024)]
    assert comparable(rows, LOSS) == rows[1:]


@pytest.mark.parametrize("metric", [LOSS, "task/mean/causal"])
def test_other_swept_keys_come_with_their_best_setting(metric):
    """By the mean over seeds: one lucky seed of a worse setting does not count."""
    sign = 1 if lower_is_better(metric) else -1
    better = [row(seed=s, rate=0.1, **{metric: sign * v}) for s, v in ((0, 3.0), (1, 3.2))]
    worse = [row(seed=s, rate=0.2, **{metric: sign * v}) for s, v in ((0, 2.9), (1, 4.0))]
    elsewhere = [row(alpha=1, rate=0.2, **{metric: sign * 5.0})]
    chosen = comparable([*worse, *better, *elsewhere], metric)
    assert sorted(chosen, key=str) == sorted([*better, *elsewhere], key=str)


def test_shorter_runs_on_the_same_unique_tokens():
    full = [row(128, alpha) for alpha in (1, 0.125)]
    shorter = [row(16, 1, budget=128, steps=1), row(32, 1, budget=256, steps=2)]
    others = [row(16, 1), row(8, 1, budget=128)]  # more unique tokens
    assert on_same_tokens([*full, *shorter, *others], unique_tokens=8, budget=1024) == shorter


def test_one_run_under_two_names_counts_once():
    rows = [row(name="a", rate=1), row(name="b", rate=1.0), row(name="c", seed=1, rate=1)]
    rows += [row(name=name, seed=None, rate=1) for name in "de"]  # their seeds are not known
    assert [found["name"] for found in usable(rows, LOSS)] == ["a", "c", "d", "e"]


def test_groups_differ_in_more_than_the_seed():
    rows = [row(seed=seed, rate=rate) for rate in (0.1, 0.2) for seed in (0, 1)]
    assert seed_groups(rows) == [rows[:2], rows[2:]]
    # alpha says what the mixture is, and the budget how many steps.
    assert len(seed_groups([row(), row(seed=1, steps=3, **{"mixture.causal": 0.5})])) == 1
    assert len(seed_groups([row(), row(seed=1, batch_size=3)])) == 2


def test_alphas_that_were_tuned_more_than_others_are_found():
    rows = [row(r, a, rate=rate) for r in (1, 4) for a in (0, 1) for rate in (0.1, 0.2)]
    assert unequal_tuning(rows, LOSS) == []
    assert unequal_tuning(rows[:-1], LOSS) == [4]
    assert unequal_tuning([*rows, row(1, 0, rate=0.3, budget=512)], LOSS) == []


def test_noise_among_seeds_is_pooled_over_cells():
    rows = [row(1, 0, loss=v) for v in (1.0, 3.0)] + [row(2, 0, loss=v) for v in (10.0, 10.0)] + [row(4, 0)]
    assert seed_sd(rows, LOSS) == pytest.approx(1.0)  # variances 2 and 0, one degree of freedom each
    assert seed_sd(rows[-1:], LOSS) is None


def test_curves_show_unfinished_and_diverged_cells_too():
    rows = [row(1, 0, rate=1), row(1, 0, loss=2.0, rate=2), row(1, 1, status="running")]
    rows += [row(2, 1, loss=None, status="diverged"), row(2, 0, status="failed"), row(2, 0, budget=2)]
    assert sorted(drawable(rows, LOSS), key=str) == sorted(rows[1:4], key=str)
    assert drawable([], LOSS) == []


def test_what_there_is_instead():
    rows = [row(status="running"), row(status="failed"), row(status="failed")]
    with pytest.raises(TooFewCells, match="1 running, 2 failed"):
        usable(rows, LOSS)
    with pytest.raises(TooFewCells, match=f"'speed'; there are {LOSS}"):
        usable([row()], "speed")
    assert measures([row(**{"best/causal/step": 3, "task/a/causal": None})]) == [LOSS]
