"""Compares training for the whole budget with shorter causal training on the same unique tokens."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from dualsm.analysis.analysis_errors import analysis_extra
from dualsm.analysis.surface import Estimate
from dualsm.analysis.table import (
    best_group,
    lower_is_better,
    main_budget,
    mean,
    on_same_tokens,
    seed_groups,
    setting,
    usable,
)
from dualsm.sweeps.cells import Row

SEEDS = 2  # fewest seeds of a group that is compared: one seed says nothing about the noise
SIGNIFICANT = 0.05  # p-value of Welch's t-test below which two groups differ


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two ways to spend a budget on the same unique tokens.

    Attributes:
      repetitions, alpha, budget_tokens: of the cells.
      score: their mean over seeds.
      runs: number of seeds.
      setting: the other swept keys, such as {"optimizer.weight_decay": 1.0}.
    """

    repetitions: float
    alpha: float
    budget_tokens: float
    score: float
    runs: int
    setting: dict


@dataclasses.dataclass(frozen=True)
class Stopping:
    """Whether shorter causal training is better than the best mixture for the whole budget, at the same R.

    Attributes:
      verdict: "stop early", "full length", "no clear difference" or "unknown".
      reason: the cells that are missing for an answer; "" unless the verdict is "unknown".
      full: the best cells of the whole budget; None without any.
      shorter: the best cells with alpha = 1 that ended, fully decayed, at a smaller budget; None without any.
      mixed: the best of such cells with 0 < alpha < 1; None without any.
      gain: the difference by which `shorter` is better (negative: worse) and its standard error, from the
        seeds of these two groups; None when the verdict is "unknown".
    """

    verdict: str
    reason: str = ""
    full: Side | None = None
    shorter: Side | None = None
    mixed: Side | None = None
    gain: Estimate | None = None


def compare_lengths(rows: Sequence[Row], metric: str, repetitions: float) -> Stopping:
    """Compares the two at exactly `repetitions`, among settings with at least `SEEDS` seeds.

    Each side takes its best setting. The answer is "unknown" when the best setting of one side was not tried
    on the other: a tuned run is not compared with an untuned one.

    Args:
      rows: a whole table.
      metric: a column.
      repetitions: R of the question.

    Raises:
      TooFewCells: when no finished cell has `metric`.
    """
    rows = usable(rows, metric)
    budget = main_budget(rows)
    whole = [row for row in rows if row["budget_tokens"] == budget]
    full = seed_groups(row for row in whole if row["repetitions"] == repetitions)
    if not full:
        tried = ", ".join(f"{r:g}" for r in sorted({row["repetitions"] for row in whole}))
        return Stopping("unknown", f"no cell of the whole budget has R = {repetitions:g}, only {tried}")
    unique = budget / repetitions
    shorter = seed_groups(on_same_tokens(rows, unique, budget))
    causal = [group for group in shorter if group[0]["alpha"] == 1]
    mixed = [group for group in shorter if 0 < group[0]["alpha"] < 1]
    if not causal:
        return Stopping("unknown", f"no shorter causal run has the same {unique:,.0f} unique tokens")
    full, causal, mixed = ([g for g in groups if len(g) >= SEEDS] for groups in (full, causal, mixed))
    sides = {
        name: _side(best_group(groups, metric), metric) if groups else None
        for name, groups in (("full", full), ("shorter", causal), ("mixed", mixed))
    }
    if not full or not causal:
        which = "cell of the whole budget" if not full else "shorter causal run"
        return Stopping("unknown", f"no {which} has {SEEDS} seeds of one setting", **sides)
    for own, others, name in (
        ("shorter", full, "for the whole budget"),
        ("full", causal, "for shorter causal runs"),
    ):
        best = sides[own].setting
        if best not in [setting(group[0]) for group in others]:
            return Stopping("unknown", f"{in_words(best)} was not tried with {SEEDS} seeds {name}", **sides)
    gain, clear = _difference(best_group(causal, metric), best_group(full, metric), metric)
    verdict = "no clear difference"
    if clear:
        verdict = "stop early" if gain.mean > 0 else "full length"
    return Stopping(verdict, gain=gain, **sides)


def in_words(setting: dict) -> str:
    """A setting such as "optimizer.weight_decay=1.0, optimizer.learning_rate=0.02"."""
    return ", ".join(f"{name}={value}" for name, value in setting.items()) or "the recipe's own setting"


def _difference(group: Sequence[Row], other: Sequence[Row], metric: str) -> tuple[Estimate, bool]:
    """By how much `group` is better, with its standard error, and whether the difference is significant."""
    with analysis_extra():
        from scipy.stats import ttest_ind_from_stats

    sign = -1 if lower_is_better(metric) else 1
    sds = [statistics.stdev(row[metric] for row in rows) for rows in (group, other)]
    gain = sign * (mean(group, metric) - mean(other, metric))
    error = math.hypot(sds[0] / math.sqrt(len(group)), sds[1] / math.sqrt(len(other)))
    if error == 0:
        return Estimate(gain, 0.0), gain != 0
    test = ttest_ind_from_stats(
        mean(group, metric), sds[0], len(group), mean(other, metric), sds[1], len(other), equal_var=False
    )
    return Estimate(gain, error), bool(test.pvalue < SIGNIFICANT)


def _side(group: Sequence[Row], metric: str) -> Side:
    first = group[0]
    return Side(
        first["repetitions"],
        first["alpha"],
        first["budget_tokens"],
        mean(group, metric),
        len(group),
        setting(first),
    )
