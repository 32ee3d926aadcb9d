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

SEEDS = 2  # minimum number of seeds of a group, to estimate the noise
SIGNIFICANT = 0.05  # p-value of Welch's t-test below which two groups differ


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two ways to spend a budget on the same unique tokens.

    Attributes:
      repetitions, alpha, budget_tokens: values of the cells.
      score: mean score over seeds.
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
    """Comparison of shorter causal training with the best mixture for the whole budget, at the same R.

    Attributes:
      verdict: "stop early", "full length", "no clear difference" or "unknown".
      reason: the cells that the comparison lacks; "" unless the verdict is "unknown".
      full: the best cells of the whole budget; None if there are none.
      shorter: the best cells with alpha = 1 that completed their schedule at a smaller budget, or None.
      mixed: the best cells with 0 < alpha < 1 that completed their schedule at a smaller budget, or None.
      gain: improvement of `shorter` over `full` (negative: worse) and its standard error, from the seeds of
        both groups; None if the verdict is "unknown".
    """

    verdict: str
    reason: str = ""
    full: Side | None = None
    shorter: Side | None = None
    mixed: Side | None = None
    gain: Estimate | None = None


def compare_lengths(table: DataFrame, metric: str, repetitions: float) -> Stopping:
    """Compares training for the whole budget with shorter causal training, at least `SEEDS` seeds each.

    Each side is represented by its best setting. The verdict is "unknown" if the best setting of one side was
    not tried on the other side: a tuned run is not compared with an untuned one.

    Args:
      table: all cells of a sweep.
      metric: column of the score.
      repetitions: R.

    Raises:
      TooFewCells: if no finished cell has `metric`.
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
            return Stopping(
                "unknown", f"{setting_text(best)} was not tried with {SEEDS} seeds {name}", **sides
            )
    gain, clear = _difference(best_group(causal, metric), best_group(full, metric), metric)
    verdict = "no clear difference"
    if clear:
        verdict = "stop early" if gain.mean > 0 else "full length"
    return Stopping(verdict, gain=gain, **sides)


def setting_text(setting: dict) -> str:
    """Formats a setting, for example "optimizer.weight_decay=1, optimizer.learning_rate=0.02"."""
    return (
        ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in setting.items()
        )
        or "the setting of the config file"
    )


def _difference(group: DataFrame, other: DataFrame, metric: str) -> tuple[Estimate, bool]:
    """Returns the improvement of `group` over `other`, and True if the difference is significant."""
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
