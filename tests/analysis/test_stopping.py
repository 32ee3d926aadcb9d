"""Comparison with shorter training: same R, settings tried on both sides, several seeds."""

import math

import pytest

from dualsm.analysis.advice_text import _stopping
from dualsm.analysis.stopping import Stopping, compare_lengths
from dualsm.analysis.table import make_table

LOSS = "valid/causal/loss"
NOISE = 0.007  # half of the difference between two seeds


def group(loss, alpha=1, repetitions=128, budget=1024, seeds=2, noise=NOISE, metric=LOSS, **setting):
    """Returns the seeds of one cell, with a mean of `loss`."""
    sign = 1 if metric == LOSS else -1
    row = {"name": "x", "status": "done", "repetitions": repetitions, "alpha": alpha, "budget_tokens": budget}
    offsets = [noise * (1 if seed % 2 else -1) for seed in range(seeds)] if seeds > 1 else [0.0]
    return [row | setting | {"seed": s, metric: sign * (loss + o)} for s, o in enumerate(offsets)]


def full_length(**options):
    """Returns all alphas at R = 128 and R = 32; the best at 128 is 1/8, with a loss of 3.0."""
    losses = ((0, 4.0), (0.125, 3.0), (0.5, 3.5), (1, 5.0))
    return [
        row
        for repetitions in (32, 128)
        for alpha, loss in losses
        for row in group(loss, alpha, repetitions, rate=0.1, **options)
    ]


def shorter(loss, repetitions=16, **options):
    """Returns causal runs on the 8 unique tokens of R = 128."""
    return group(loss, repetitions=repetitions, budget=8 * repetitions, **({"rate": 0.1} | options))


def compare(*groups, repetitions=128, metric=LOSS):
    return compare_lengths(make_table([row for rows in groups for row in rows]), metric, repetitions)


@pytest.mark.parametrize("metric", [LOSS, "task/mean/prefix"])
@pytest.mark.parametrize(
    ("loss", "verdict"),
    [(2.5, "stop early"), (3.005, "no clear difference"), (3.5, "full length")],
)
def test_the_better_length_is_found(loss, verdict, metric):
    found = compare(full_length(metric=metric), shorter(loss, metric=metric), metric=metric)
    assert found.verdict == verdict
    assert found.reason == ""
    assert found.gain.mean == pytest.approx(3.0 - loss)
    assert (found.full.repetitions, found.full.alpha, found.full.runs) == (128, 0.125, 2)
    assert (found.shorter.repetitions, found.shorter.budget_tokens) == (16, 128)


def test_the_standard_error_comes_from_the_compared_groups():
    """The other cells are much noisier; two seeds with 2.9 and 3.1 have a standard error of 0.1."""
    noisy = [row for row in full_length(noise=0.5) if row["alpha"] != 0.125]
    found = compare(noisy, group(3.0, 0.125, rate=0.1, noise=0), shorter(2.5, noise=0.1))
    assert found.gain.sd == pytest.approx(0.1)
    assert found.verdict == "no clear difference"  # 5 standard errors from only two seeds: p = 0.13
    assert compare(full_length(), shorter(2.5)).gain.sd == pytest.approx(NOISE * math.sqrt(2))


def test_runs_at_a_different_r_are_not_compared():
    for repetitions in (64, 100, 127):
        found = compare(full_length(), shorter(2.5), repetitions=repetitions)
        assert found.verdict == "unknown"
        assert f"R = {repetitions}, only 32, 128" in found.reason
    found = compare(full_length(), shorter(2.5), repetitions=32)  # shorter runs have other unique tokens
    assert (found.verdict, found.full) == ("unknown", None)
    assert "no shorter causal run has the same 32 unique tokens" in found.reason


def test_a_tuned_side_is_not_compared_with_an_untuned_one():
    tuned = shorter(2.4, repetitions=32, rate=0.3)
    found = compare(full_length(), shorter(2.9), tuned)
    assert (found.verdict, found.gain) == ("unknown", None)
    assert "rate=0.3 was not tried with 2 seeds for the whole budget" in found.reason
    assert (found.shorter.score, found.full.score) == (pytest.approx(2.4), pytest.approx(3.0))
    found = compare(full_length(), group(2.2, 0.5, rate=0.3), shorter(2.9))
    assert "rate=0.3 was not tried with 2 seeds for shorter causal runs" in found.reason
    both = compare(full_length(), group(2.6, 0.5, rate=0.3), shorter(2.9), tuned)
    assert (both.verdict, both.full.setting, both.shorter.setting) == (
        "stop early", {"rate": 0.3}, {"rate": 0.3},
    )  # fmt: skip
    # A worse setting that only one side tried does not matter.
    assert compare(full_length(), shorter(2.5), shorter(2.9, rate=0.3)).verdict == "stop early"


def test_groups_with_a_single_seed_are_ignored():
    single = shorter(2.0, repetitions=32, seeds=1)
    assert compare(full_length(), shorter(2.5), single).shorter.score == pytest.approx(2.5)
    found = compare(full_length(), single)
    assert (found.verdict, found.shorter) == ("unknown", None)
    assert "no shorter causal run has 2 seeds" in found.reason
    found = compare(full_length(seeds=1), shorter(2.5))
    assert "no cell of the whole budget has 2 seeds" in found.reason
    copies = [row | {"name": name} for row in single for name in "ab"]  # one run under two names
    assert compare(full_length(), copies).verdict == "unknown"


def test_an_integer_setting_equals_the_same_float():
    as_given = [row | {"steps": 16, "rate": 0.1} for row in shorter(2.5)]
    as_whole = [row | {"steps": 128, "decay": 1} for row in full_length()]
    found = compare(as_whole, [row | {"decay": 1.0} for row in as_given])
    assert found.verdict == "stop early"


def test_shorter_mixed_runs_are_reported():
    mixed = group(2.6, 0.5, repetitions=16, budget=128, rate=0.1)
    assert compare(full_length(), shorter(2.5)).mixed is None
    found = compare(full_length(), shorter(2.5), mixed)
    assert (found.shorter.alpha, found.mixed.alpha, found.mixed.score) == (1, 0.5, pytest.approx(2.6))
    assert "shorter mixed runs: causal 1/2, 16 repetitions" in "\n".join(_stopping(found))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(2.5, "? yes, shorter"), (3.005, "? shorter causal training was as good"), (3.5, "? no, shorter")],
)
def test_text_of_the_verdicts(loss, expected):
    text = "\n".join(_stopping(compare(full_length(), shorter(loss))))
    assert f"stop earlier{expected}" in text
    assert "causal 1, 16 repetitions, 128 tokens, rate=0.1: " in text
    assert "causal 1/8, 128 repetitions, 1,024 tokens, rate=0.1: 3 (mean of 2 seeds)" in text
    assert "difference " in text


def test_text_of_an_unknown_verdict():
    assert _stopping(Stopping("unknown", "no cells")) == ["    stop earlier? unknown: no cells"]
