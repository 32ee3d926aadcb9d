"""Compares training for the whole budget with shorter causal training on the same unique tokens."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from dualsm.analysis.analysis_errors import analysis_extra
from dualsm.analysis.surface import Estimate
from dualsm.analysis.table import (
    best_group,
    lower_is_better,
    main_budget,
    on_same_tokens,
    seed_groups,
    setting,
    usable,
)

if TYPE_CHECKING:
    from pandas import DataFrame

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


def compare_lengths(table: DataFrame, metric: str, repetitions: float) -> Stopping:
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
    table = usable(table, metric)
    budget = main_budget(table)
    whole = table[table["budget_tokens"] == budget]
    full = seed_groups(whole[whole["repetitions"] == repetitions])
    if not full:
        tried = ", ".join(f"{r:g}" for r in sorted(whole["repetitions"].unique()))
        return Stopping("unknown", f"no cell of the whole budget has R = {repetitions:g}, only {tried}")
    unique = budget / repetitions
    shorter = on_same_tokens(table, unique, budget)
    causal = seed_groups(shorter[shorter["alpha"] == 1])
    mixed = seed_groups(shorter[shorter["alpha"].between(0, 1, inclusive="neither")])
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
        if best not in [setting(group) for group in others]:
            return Stopping("unknown", f"{in_words(best)} was not tried with {SEEDS} seeds {name}", **sides)
    gain, clear = _difference(best_group(causal, metric), best_group(full, metric), metric)
    verdict = "no clear difference"
    if clear:
        verdict = "stop early" if gain.mean > 0 else "full length"
    return Stopping(verdict, gain=gain, **sides)


def in_words(setting: dict) -> str:
    """A setting such as "optimizer.weight_decay=1.0, optimizer.learning_rate=0.02"."""
    return (
        ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in setting.items()
        )
        or "the recipe's own setting"
    )


def _difference(group: DataFrame, other: DataFrame, metric: str) -> tuple[Estimate, bool]:
    """By how much `group` is better, with its standard error, and whether the difference is significant."""
    with analysis_extra():
        from scipy.stats import ttest_ind_from_stats

    sign = -1 if lower_is_better(metric) else 1
    score, other_score = group[metric], other[metric]
    gain = float(sign * (score.mean() - other_score.mean()))
    error = math.hypot(score.sem(), other_score.sem())
    if error == 0:
        return Estimate(gain, 0.0), gain != 0
    moments = [
        value for column in (score, other_score) for value in (column.mean(), column.std(), len(column))
    ]
    test = ttest_ind_from_stats(*moments, equal_var=False)
    return Estimate(gain, error), bool(test.pvalue < SIGNIFICANT)


def _side(group: DataFrame, metric: str) -> Side:
    repetitions, alpha, budget_tokens = group[["repetitions", "alpha", "budget_tokens"]].iloc[0].tolist()
    return Side(repetitions, alpha, budget_tokens, float(group[metric].mean()), len(group), setting(group))
