"""Reading and writing the table of cells, and selecting the cells that can be compared."""

import math

import pytest
from pandas.testing import assert_frame_equal

from dualsm.analysis.analysis_errors import TooFewCells
from dualsm.analysis.table import (
    comparable,
    drawable,
    load,
    lower_is_better,
    make_table,
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
from tests.analysis.synthetic import grid, write_sweep

LOSS = "valid/causal/loss"


def row(repetitions=1, alpha=0.5, loss=3.0, budget=1024, status="done", **more):
    fixed = {"name": "x", "status": status, "repetitions": repetitions, "alpha": alpha, "seed": 0}
    return fixed | {"budget_tokens": budget, LOSS: loss} | more


def selected(result, table):
    """Returns the positions of the selected rows."""
    assert_frame_equal(result, table.loc[result.index])
    return sorted(result.index)


DIRECTIONS = {
    LOSS: True,
    "answer/piqa/causal/bits_per_byte": True,
    "task/piqa/causal": False,
    "acceptance/greedy": False,
}


@pytest.mark.parametrize(("metric", "lower"), DIRECTIONS.items())
def test_direction_of_a_metric(metric, lower):
    assert lower_is_better(metric) == lower


def test_written_values_are_read_back(tmp_path):
    """Numbers keep all digits; text keeps its spaces, quotes and line breaks; None becomes NaN."""
    numbers, texts = [0.1, 1 / 3, 1e-300, -7, None], ["a,b", "two\nlines", '"', " 3", "NA"]
    rows = [row(loss=n, value=n, text=t, name=f"cell {t}") for n, t in zip(numbers, texts, strict=True)]
    write_table(tmp_path / "t.csv", make_table(rows))
    back = read_table(tmp_path / "t.csv")
    assert back[LOSS].tolist()[:4] == back["value"].tolist()[:4] == numbers[:4]
    assert back[[LOSS, "value"]].iloc[4].isna().all()
    assert back["text"].tolist() == texts
    assert list(tmp_path.iterdir()) == [tmp_path / "t.csv"]


def test_a_sweep_is_read_back(tmp_path):
    write_sweep(tmp_path, grid([1, 4], [0, 1 / 64, 1]), missing=("later",))
    table = load(tmp_path)
    write_table(tmp_path / "table.csv", table)
    back = load(tmp_path / "table.csv")
    assert_frame_equal(back, table, check_dtype=False, check_exact=True)
    assert list(back)[:3] == ["name", "status", "reason"]
    assert (
        (tmp_path / "table.csv")
        .read_text()
        .splitlines()[1]
        .startswith('"repetitions=1,alpha=0",done,,1,0.0,0,')
    )


BAD = {
    "empty": ("", "status"),
    "another table": ("a,b\n1,2\n", "no column"),
    "short row": ("status,repetitions,alpha,budget_tokens\ndone,1\n", "row 2: 2 values for 4 columns"),
    "not a number": ("status,repetitions,alpha,budget_tokens\ndone,many,1,5\n", "repetitions='many'"),
    "alpha above 1": ("status,repetitions,alpha,budget_tokens\ndone,1,1.5,5\n", "alpha=1.5"),
    "no repetition": ("status,repetitions,alpha,budget_tokens\ndone,0,1,5\n", "repetitions=0"),
    "binary": (b"\xff\xfe\x00", "not a CSV table"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_raise_one_line(tmp_path, case):
    content, expected = BAD[case]
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"t\.csv") as error:
        read_table(path)
    assert expected in str(error.value)
    with pytest.raises(UserError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_values_that_cannot_be_grouped_by_become_text():
    table = make_table([row(value=[1]), row(value={"a": 1}), row(value=2)])
    assert len(seed_groups(table)) == 3


def test_only_finished_cells_of_one_budget_are_comparable():
    good = [row(alpha=a) for a in (0, 0.5, 1)]
    bad = [row(status=s) for s in ("running", "failed", "diverged", "missing", "damaged")]
    bad += [row(alpha=None), row(loss=None), row(loss=math.nan), row(loss=math.inf), row(budget=512)]
    table = make_table([*bad, row(budget=None), *good])
    assert selected(comparable(table, LOSS), table) == [11, 12, 13]


def test_the_larger_of_equally_frequent_budgets_is_used():
    table = make_table([row(budget=512), row(budget=1024)])
    assert selected(comparable(table, LOSS), table) == [1]


@pytest.mark.parametrize("metric", [LOSS, "task/mean/causal"])
def test_other_swept_keys_take_their_best_setting(metric):
    """The mean over seeds decides: one good seed of a worse setting does not."""
    sign = 1 if lower_is_better(metric) else -1
    better = [row(seed=s, rate=0.1, **{metric: sign * v}) for s, v in ((0, 3.0), (1, 3.2))]
    worse = [row(seed=s, rate=0.2, **{metric: sign * v}) for s, v in ((0, 2.9), (1, 4.0))]
    elsewhere = [row(alpha=1, rate=0.2, **{metric: sign * 5.0})]
    table = make_table([*worse, *better, *elsewhere])
    assert selected(comparable(table, metric), table) == [2, 3, 4]


def test_shorter_runs_on_the_same_unique_tokens():
    full = [row(128, alpha) for alpha in (1, 0.125)]
    shorter = [row(16, 1, budget=128, steps=1), row(32, 1, budget=256, steps=2)]
    others = [row(16, 1), row(8, 1, budget=128)]  # more unique tokens
    table = make_table([*full, *shorter, *others])
    assert selected(on_same_tokens(table, unique_tokens=8, budget=1024), table) == [2, 3]


def test_one_run_under_two_names_counts_once():
    rows = [row(name="a", rate=1), row(name="b", rate=1.0), row(name="c", seed=1, rate=1)]
    rows += [row(name=name, seed=None, rate=1) for name in "de"]  # unknown seeds may differ
    assert usable(make_table(rows), LOSS)["name"].tolist() == ["a", "c", "d", "e"]


def test_groups_share_everything_but_the_seed():
    table = make_table([row(seed=seed, rate=rate) for rate in (0.1, 0.2) for seed in (0, 1)])
    assert [list(group.index) for group in seed_groups(table)] == [[0, 1], [2, 3]]
    # alpha describes the mixture, and the budget the number of steps.
    assert len(seed_groups(make_table([row(), row(seed=1, steps=3, **{"mixture.causal": 0.5})]))) == 1
    assert len(seed_groups(make_table([row(), row(seed=1, batch_size=3)]))) == 2


def test_unequally_tuned_alphas_are_found():
    rows = [row(r, a, rate=rate) for r in (1, 4) for a in (0, 1) for rate in (0.1, 0.2)]
    assert unequal_tuning(make_table(rows), LOSS) == []
    assert unequal_tuning(make_table(rows[:-1]), LOSS) == [4]
    assert unequal_tuning(make_table([*rows, row(1, 0, rate=0.3, budget=512)]), LOSS) == []


def test_the_noise_among_seeds_is_pooled_over_cells():
    rows = [row(1, 0, loss=v) for v in (1.0, 3.0)] + [row(2, 0, loss=v) for v in (10.0, 10.0)] + [row(4, 0)]
    table = make_table(rows)
    assert seed_sd(table, LOSS) == pytest.approx(1.0)  # variances 2 and 0, one degree of freedom each
    assert seed_sd(table[-1:], LOSS) is None


def test_curves_include_unfinished_and_diverged_cells():
    rows = [row(1, 0, rate=1), row(1, 0, loss=2.0, rate=2), row(1, 1, status="running")]
    rows += [row(2, 1, loss=None, status="diverged"), row(2, 0, status="failed"), row(2, 0, budget=2)]
    table = make_table(rows)
    assert selected(drawable(table, LOSS), table) == [1, 2, 3]
    assert drawable(make_table([]), LOSS).empty
    assert drawable(table[:0], LOSS).empty


def test_errors_name_the_available_metrics_and_states():
    table = make_table([row(status="running"), row(status="failed"), row(status="failed")])
    with pytest.raises(TooFewCells, match="1 running, 2 failed"):
        usable(table, LOSS)
    with pytest.raises(TooFewCells, match=f"'speed'; choose one of {LOSS}"):
        usable(make_table([row()]), "speed")
    assert measures(make_table([row(**{"best/causal/step": 3, "task/a/causal": None})])) == [LOSS]
