"""Which mixture to train with, by a table of cells or by the paper's rules, and whether to stop instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dualsm.analysis import rules
from dualsm.analysis.scales import octaves_outside
from dualsm.analysis.stopping import Stopping, compare_lengths
from dualsm.analysis.summary import by_mixture
from dualsm.analysis.surface import Recommendation, Surface, fit_surface
from dualsm.analysis.table import comparable, lower_is_better, mean, seed_sd, unequal_tuning
from dualsm.sweeps.cells import Row

SHIPPED = Path(__file__).with_name("shipped.csv")  # the project's own sweep
DEFAULT_METRIC = "valid/causal/loss"


@dataclasses.dataclass(frozen=True)
class Advice:
    """The answer of one source to: which mixture, at this repetition?

    Attributes:
      repetitions: R.
      alpha: share of causal rows; all others are masked diffusion.
      source: "surface" of a table of cells, or "rules" of the paper.
      octaves_outside: how far R lies outside the tried range; 0 inside.
      tried: the tried range of R.
      parameters: the smallest and the largest of the models that it comes from; None where not known.
      table: of "surface": what it was fitted to (metric, cells, budget, noise), else None.
      surface: of "surface": the recommendation with its uncertainty, else None.
      measured: of "surface": alpha -> mean score and number of seeds of the cells at exactly this R.
      stopping: of "surface": whether shorter causal training is better; None where nothing repeats.
    """

    repetitions: float
    alpha: float
    source: str
    octaves_outside: float
    tried: tuple[float, float]
    parameters: tuple[int, int] | None
    table: dict | None = None
    surface: Recommendation | None = None
    measured: dict[float, tuple[float, int]] | None = None
    stopping: Stopping | None = None


def advise_by_rules(repetitions: float) -> Advice:
    """The paper's rules, which need no table."""
    return Advice(
        repetitions=repetitions,
        alpha=rules.rule_alpha(repetitions),
        source="rules",
        octaves_outside=octaves_outside(repetitions, *rules.TRIED_REPETITIONS),
        tried=rules.TRIED_REPETITIONS,
        parameters=(rules.PARAMETERS, rules.PARAMETERS),
    )


def advise_by_table(rows: Sequence[Row], metric: str, repetitions: float) -> Advice:
    """The surface of a table of cells.

    Raises:
      UserError: when the table has too few finished cells with `metric`.
    """
    cells = comparable(rows, metric)
    surface = fit_to_cells(cells, metric)
    recommendation = surface.recommend(repetitions)
    parameters = [cell["parameters"] for cell in cells if isinstance(cell.get("parameters"), int)]
    here = {alpha: group for (r, alpha), group in by_mixture(rows, metric).items() if r == repetitions}
    return Advice(
        repetitions=repetitions,
        alpha=recommendation.alpha,
        source="surface",
        octaves_outside=recommendation.octaves_outside,
        tried=(float(surface.repetitions_C.min()), float(surface.repetitions_C.max())),
        parameters=(min(parameters), max(parameters)) if parameters else None,
        table={
            "metric": metric,
            "lower_is_better": surface.lower_is_better,
            "cells": len(cells),
            "budget_tokens": cells[0]["budget_tokens"],
            # Without seeds to tell it from, a surface takes noise for shape and calls it too small.
            "noise_sd": max(surface.noise_sd, seed_sd(cells, metric) or 0.0),
            "unequally_tuned": unequal_tuning(rows, metric),
        },
        surface=recommendation,
        measured={alpha: (mean(group, metric), len(group)) for alpha, group in sorted(here.items())},
        stopping=compare_lengths(rows, metric, repetitions) if repetitions > 1 else None,
    )


def fit_to_cells(cells: Sequence[Row], metric: str) -> Surface:
    """The surface of the cells that `table.comparable` chose."""
    columns = ([cell[name] for cell in cells] for name in ("repetitions", "alpha", metric))
    return fit_surface(*columns, lower_is_better=lower_is_better(metric))
