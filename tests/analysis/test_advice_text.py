"""Numbers in the text of recommendations."""

import pytest

from dualsm.analysis.advice import advise_by_rules, advise_by_table, round_repetitions
from dualsm.analysis.advice_text import describe
from dualsm.analysis.table import load
from tests.analysis.synthetic import grid, write_sweep


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return load(write_sweep(tmp_path_factory.mktemp("sweep"), grid([4, 128], [0, 1 / 8, 1 / 2, 1])))


@pytest.mark.parametrize(
    ("repetitions", "rules", "surface"),
    [
        (4, "R = 4 is inside this range", "R = 4 is inside this range"),
        (129, "R = 129 is inside this range", "R = 129 is at the edge of this range"),
        (132, "R = 132 is inside this range", "R = 132 is at the edge of this range"),
        (133, "R = 133 is inside this range", "R = 133 is 0.1 doublings outside this range"),
        (265, "R = 265 is at the edge of this range", "R = 265 is 1.0 doublings outside this range"),
        (266, "R = 266 is 0.1 doublings outside this range", "R = 266 is 1.1 doublings outside this range"),
    ],
)
def test_no_warning_about_a_distance_that_rounds_to_zero(table, repetitions, rules, surface):
    for source, advice in (
        (rules, advise_by_rules(repetitions)),
        (surface, advise_by_table(table, "valid/causal/loss", repetitions)),
    ):
        text = describe(round_repetitions(1, repetitions), [advice], "x")
        (line,) = [line for line in text.splitlines() if "repetitions were tried" in line]
        assert line.endswith(f"repetitions were tried; {source}")
        assert ("warning" in line) == ("doublings" in line)


@pytest.mark.parametrize(
    ("budget", "fewer"), [(4_000_400, "0.01%"), (4_000_100, ""), (4_000_010, ""), (4_000_000, "")]
)
def test_a_share_of_tokens_that_rounds_to_zero_is_not_printed(budget, fewer):
    question = round_repetitions(1_000_000, budget)
    text = describe(question, [advise_by_rules(question.repetitions)], "")
    assert (f"train on 4,000,000 tokens, {fewer} fewer" in text) == bool(fewer)
    assert ("whole number" in text) == bool(fewer)


def test_the_line_about_different_answers_names_the_sweep_only_if_there_is_one(table):
    question = round_repetitions(1_000_000, 4_000_000)
    rules = advise_by_rules(question.repetitions)
    own = advise_by_table(table, "valid/causal/loss", question.repetitions)
    assert own.alpha != rules.alpha
    common = "the answers differ: each is valid for the model size and metric of its source; "
    with_sweep = describe(question, [own, rules], "runs/sweep").splitlines()
    assert with_sweep[-1] == common + "the first answer is from runs/sweep"
    assert not any("--sweep" in line for line in with_sweep)
    without = describe(question, [rules, own], "").splitlines()
    assert without[-1] == common + "run a sweep of your own models and pass it with --sweep"
