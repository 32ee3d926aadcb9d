"""The reproduction's page follows from its tables, and its choices from the protocol's rules."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "reproduction"
pd = pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(FOLDER))
    import page
    import study

    sys.path.remove(str(FOLDER))
    return page, study


@pytest.fixture(scope="module")
def runs():
    return pd.read_csv(FOLDER / "runs.csv")


def test_the_page_is_what_the_tables_give(modules, runs):
    page, _ = modules
    assert page.render(runs) == page.PAGE.read_text()
    assert page.averaged_page(runs) == page.AVERAGED.read_text()


def test_the_page_is_short(modules):
    page, _ = modules
    assert len(page.PAGE.read_text().split()) <= 1800


def test_the_table_of_recommend_is_what_the_tables_give(modules, runs):
    page, _ = modules
    assert page.confirmed_csv(runs) == page.CONFIRMED.read_text()


def test_choices_on_the_page_are_those_of_the_study(modules, runs):
    page, study = modules
    keys = ["recipe", "R", "alpha", "weight_decay", "length", "corpus", "seed", "size", "causal_weight"]
    results = [
        {"run": {key: row[key] for key in keys}, "dev/causal/loss": row["dev_causal"]}
        for row in runs.to_dict("records")
    ]
    chosen, on_page = study.choose(results), page.Chosen(runs)
    for R in (128, 32):
        for alpha in study.ALPHAS[R]:
            for kind in ("full", "stop"):
                run = chosen[f"plain,{R},{alpha}"][kind]["run"]
                cell = on_page.best("plain", R, alpha, kind)
                assert all(run[key] == value for key, value in cell.items())
        assert on_page.mixture(R, "full")["alpha"] == study.best_alpha(chosen, R, "full")


def test_every_confirmed_cell_has_all_replicates(modules, runs):
    _, study = modules
    confirmed = runs[runs.stage == "confirm"]
    for (R, *_), found in confirmed.groupby(["R", "alpha", "weight_decay", "length", "causal_weight"]):
        expected = study.REPLICATES if R == 128 else study.REPLICATES[::2]
        assert sorted(zip(found.corpus, found.seed, strict=True)) == sorted(expected)


def test_standard_errors_are_over_corpora(modules):
    page, _ = modules
    values = pd.Series(
        [1.0, 3.0, 4.0, 6.0, 9.0, 9.0],
        index=pd.MultiIndex.from_product([["B", "C", "D"], [1, 2]], names=["corpus", "seed"]),
    )
    mean, error = page.over_corpora(values)  # the means of the corpora are 2, 5 and 9
    assert mean == pytest.approx(16 / 3)
    assert error == pytest.approx(((2 - 16 / 3) ** 2 + (5 - 16 / 3) ** 2 + (9 - 16 / 3) ** 2) ** 0.5 / 6**0.5)


def test_every_run_has_steps_that_a_config_can_have(modules):
    _, study = modules
    for size, (*_, steps) in study.SIZES.items():
        for length in study.LENGTHS[128]:
            assert (steps * length) % (steps // study.POINTS) == 0, size
