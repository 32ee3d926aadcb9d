"""The tables that a sweep ends with."""

from dualsm.analysis.summary import summary


def cell(repetitions, alpha, loss, score=None, seed=0, status="done"):
    measured = {"valid/causal/loss": loss, "task/mean/causal": score}
    return {"status": status, "repetitions": repetitions, "alpha": alpha, "seed": seed} | {
        "budget_tokens": 1000, **measured
    }  # fmt: skip


def test_means_over_seeds_and_the_best_of_each_column():
    rows = [
        cell(1, 1.0, 2.5, 30.0), cell(1, 0.125, 2.75, 31.0), cell(16, 0.125, 3.0), cell(16, 1.0, 3.25),
        cell(16, 1.0, 3.5, seed=1), cell(64, 1.0, None, status="running"),
    ]  # fmt: skip
    text = summary(rows, ["valid/causal/loss", "task/mean/causal", "valid/prefix/loss"])
    assert text.split("\n\n") == [
        "valid/causal/loss\n"
        "alpha    R 1    R 16 \n"
        "-----  ------  ------\n"
        "1/8    2.750   3.000*\n"
        "1      2.500*  3.375 ",
        "task/mean/causal\n"
        "alpha     R 1 \n"
        "-----  -------\n"
        "1/8    31.000*\n"
        "1      30.000 ",
    ]  # fmt: skip


def test_nothing_finished_is_no_table():
    assert summary([cell(1, 1.0, None, status="missing")], ["valid/causal/loss"]) == ""
