"""Which mixture to train with, by a table of cells or by the paper's rules, and whether to stop instead."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from dualsm.analysis import rules
from dualsm.analysis.cells import Row
from dualsm.analysis.scales import octaves_outside
from dualsm.analysis.surface import Estimate, Recommendation, Surface, fit_surface
from dualsm.analysis.table import comparable, lower_is_better, mean, seed_sd, setting, shorter_runs

SHIPPED = Path(__file__).with_name("shipped.csv")  # the project's own sweep
DEFAULT_METRIC = "valid/causal/loss"
CLEAR = 2  # standard deviations beyond which a difference between cells is taken as one
NEAR = 1.0  # octaves within which cells at another R are told of


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two ways to spend a budget on the same unique tokens.

    Attributes:
      repetitions, alpha, budget_tokens: of the cells.
      score: their mean over seeds.
      runs: how many seeds.
      setting: what else was swept, such as {"optimizer.weight_decay": 1.0}; the budget says the steps.
    """

    repetitions: float
    alpha: float
    budget_tokens: float
    score: float
    runs: int
    setting: dict


@dataclasses.dataclass(frozen=True)
class Stopping:
    """Training to the end with the best mixture, against shorter causal training on the same unique tokens.

    Attributes:
      unique_tokens: of both.
      full: the best cells of the whole budget.
      shorter: the best cells with alpha = 1 that ended, fully decayed, at a smaller budget.
      mixed: the best of such cells with 0 < alpha < 1; None where there are none.
      gain: by how much `shorter` is better; negative: worse.
      verdict: "stop early", "full mixture" or "no clear difference".
    """

    unique_tokens: float
    full: Side
    shorter: Side
    mixed: Side | None
    gain: Estimate
    verdict: str


@dataclasses.dataclass(frozen=True)
class Advice:
    """The answer to: which mixture, at this repetition?

    Attributes:
      repetitions: R.
      alpha: share of causal rows; all others are masked diffusion.
      source: "surface" of a table of cells, or "rules" of the paper.
      octaves_outside: how far R lies outside the tried range; 0 inside.
      tried: the tried range of R.
      table: of "surface": what it was fitted to (metric, cells, budget, parameters), else None.
      surface: of "surface": the recommendation with its uncertainty, else None.
      stopping: of "surface": whether shorter causal training is better, None where no cells tell.
    """

    repetitions: float
    alpha: float
    source: str
    octaves_outside: float
    tried: tuple[float, float]
    table: dict | None = None
    surface: Recommendation | None = None
    stopping: Stopping | None = None


def advise_by_rules(repetitions: float) -> Advice:
    """The paper's rules, for who has no table."""
    return Advice(
        repetitions=repetitions,
        alpha=rules.rule_alpha(repetitions),
        source="rules",
        octaves_outside=octaves_outside(repetitions, *rules.TRIED_REPETITIONS),
        tried=rules.TRIED_REPETITIONS,
    )


def advise_by_table(rows: Sequence[Row], metric: str, repetitions: float) -> Advice:
    """The surface of a table of cells.

    Raises:
      UserError: when the table has too few finished cells with `metric`.
    """
    cells = comparable(rows, metric)
    surface = fit_to_cells(cells, metric)
    recommendation = surface.recommend(repetitions)
    # Without seeds to tell it from, a surface takes noise for shape and calls it too small.
    noise_sd = max(surface.noise_sd, seed_sd(cells, metric) or 0.0)
    return Advice(
        repetitions=repetitions,
        alpha=recommendation.alpha,
        source="surface",
        octaves_outside=recommendation.octaves_outside,
        tried=(float(surface.repetitions_C.min()), float(surface.repetitions_C.max())),
        table={
            "metric": metric,
            "lower_is_better": surface.lower_is_better,
            "cells": len(cells),
            "budget_tokens": cells[0]["budget_tokens"],
            "parameters": cells[0].get("parameters"),
            "noise_sd": noise_sd,
        },
        surface=recommendation,
        stopping=stopping(rows, cells, metric, repetitions, noise_sd),
    )


def fit_to_cells(cells: Sequence[Row], metric: str) -> Surface:
    """The surface of the cells that `table.comparable` chose."""
    columns = ([cell[name] for cell in cells] for name in ("repetitions", "alpha", metric))
    return fit_surface(*columns, lower_is_better=lower_is_better(metric))


def stopping(
    rows: Sequence[Row], cells: Sequence[Row], metric: str, repetitions: float, noise_sd: float
) -> Stopping | None:
    """Compares the two at the tried R nearest to `repetitions` at which cells of both kinds exist.

    Args:
      rows: of the whole table.
      cells: those of the main budget, from `table.comparable`.
      metric: a column.
      repetitions: R of the question.
      noise_sd: standard deviation of a single run.

    Returns:
      None when no such cells exist within an octave of R.
    """
    tried = {cell["repetitions"] for cell in cells if distance(cell["repetitions"], repetitions) <= NEAR}
    for near in sorted(tried, key=lambda other: distance(other, repetitions)):
        budget = cells[0]["budget_tokens"]
        shorter = shorter_runs(rows, metric, budget / near, budget)
        causal = [group for group in shorter if group[0]["alpha"] == 1]
        mixed = [group for group in shorter if 0 < group[0]["alpha"] < 1]
        if causal:
            here = [cell for cell in cells if cell["repetitions"] == near]
            return _compare(_best(here, metric), causal[0], mixed[0] if mixed else None, metric, noise_sd)
    return None


def distance(a: float, b: float) -> float:
    """Octaves between two numbers of repetitions."""
    return abs(math.log2(a / b))


def _best(cells: Sequence[Row], metric: str) -> list[Row]:
    """All seeds of the best alpha."""
    alphas = {cell["alpha"] for cell in cells}
    groups = [[cell for cell in cells if cell["alpha"] == alpha] for alpha in alphas]
    choose = min if lower_is_better(metric) else max
    return choose(groups, key=lambda group: mean(group, metric))


def _compare(
    full: Sequence[Row], shorter: Sequence[Row], mixed: Sequence[Row] | None, metric: str, noise_sd: float
) -> Stopping:
    sign = -1 if lower_is_better(metric) else 1
    gain = sign * (mean(shorter, metric) - mean(full, metric))
    sd = noise_sd * math.sqrt(1 / len(full) + 1 / len(shorter))
    if abs(gain) <= CLEAR * sd:
        verdict = "no clear difference"
    else:
        verdict = "stop early" if gain > 0 else "full mixture"
    unique = full[0]["budget_tokens"] / full[0]["repetitions"]
    return Stopping(
        unique_tokens=unique,
        full=_side(full, metric),
        shorter=_side(shorter, metric),
        mixed=_side(mixed, metric) if mixed else None,
        gain=Estimate(gain, sd),
        verdict=verdict,
    )


def _side(group: Sequence[Row], metric: str) -> Side:
    first = group[0]
    swept = {name: value for name, value in setting(first).items() if name != "steps"}
    return Side(
        first["repetitions"], first["alpha"], first["budget_tokens"], mean(group, metric), len(group), swept
    )
