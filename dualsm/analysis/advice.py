"""Recommends a mixture from a table of cells or by the paper's rules, or to stop training earlier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from etils import epath

from dualsm.analysis import paper_rules
from dualsm.analysis.scales import doublings_outside
from dualsm.analysis.stopping import Stopping, compare_lengths
from dualsm.analysis.surface import Recommendation, Surface, fit_surface
from dualsm.analysis.table import comparable, load, lower_is_better, seed_sd, unequal_tuning
from dualsm.objectives.registry import OBJECTIVES
from dualsm.objectives.sources import RESERVED_NAMES
from dualsm.process.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

SHIPPED = Path(__file__).with_name("shipped.csv")  # the sweep in docs/reproduction.md
DEFAULT_METRIC = "valid/causal/loss"
INSTALL = "pip install 'dualsm[analysis]'"


@dataclasses.dataclass(frozen=True)
class TokenBudget:
    """A token budget, a corpus size, and the whole number of repetitions that fits both best.

    Attributes:
      unique_tokens, budget_tokens: size of the corpus, and tokens to train on.
      repetitions: R, as in `config.repetitions`.
      seen_unique_tokens, seen_tokens: unique and total tokens of a run with R passes over its data.
    """

    unique_tokens: float
    budget_tokens: float
    repetitions: int
    seen_unique_tokens: float
    seen_tokens: float


def round_repetitions(unique: float, budget: float) -> TokenBudget:
    """Rounds budget / unique to a whole R, such that the unused share of the budget or corpus is smallest."""
    passes = budget / unique
    if passes <= 1:
        return TokenBudget(unique, budget, 1, budget, budget)
    low, high = math.floor(passes + 1e-9), math.ceil(passes - 1e-9)
    if 1 - low / passes < 1 - passes / high:
        return TokenBudget(unique, budget, low, unique, low * unique)
    return TokenBudget(unique, budget, high, budget / high, budget)


class NamedSource(NamedTuple):
    """A source of `config.sources`, and its share of the training tokens."""

    name: str
    share: float


def mixture_flags(alpha: float, repetitions: float, source: NamedSource | None) -> list[str]:
    """Returns the flags that set a mixture and R, of the whole run or of a source."""
    key = f"--config.sources.{source.name}" if source else "--config"
    values = {
        "mixture.causal": f"{alpha:.6g}",
        "mixture.prefix": "0.0",
        "mixture.masked_diffusion": f"{1 - alpha:.6g}",
        "repetitions": f"{repetitions:.0f}",
    } | ({"share": repr(source.share)} if source else {})
    return [f"{key}.{name}={value}" for name, value in values.items()]


def parse_sources(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Parses sources such as "small:1e8:1.6e9".

    Args:
      texts: NAME:UNIQUE_TOKENS:BUDGET of each source.

    Returns:
      name -> unique tokens and budget.

    Raises:
      UserError: if a text is malformed, or a name is given twice.
    """
    questions = {}
    for text in texts:
        name, _, numbers = text.partition(":")
        try:
            unique, budget = map(float, numbers.split(":"))
        except ValueError as error:
            raise UserError(f"--source={text!r} is not of the form NAME:UNIQUE_TOKENS:BUDGET") from error
        if not (name.isidentifier() and 1 <= unique < math.inf and 1 <= budget < math.inf):
            raise UserError(
                f"--source={text!r}: the name must be an identifier, and the numbers of tokens at least 1 "
                "and finite"
            )
        if name in OBJECTIVES or name in RESERVED_NAMES:
            raise UserError(f"--source={text!r}: choose another name; {name!r} is reserved (config.sources)")
        if name in questions:
            raise UserError(f"--source: {name!r} is given twice; give each source once")
        questions[name] = (unique, budget)
    return questions


@dataclasses.dataclass(frozen=True)
class Advice:
    """Recommended mixture of one source at R repetitions.

    Attributes:
      repetitions: R.
      alpha: share of causal rows; all others are masked diffusion.
      source: "surface" (fitted to a table of cells) or "rules" (of the paper).
      doublings_outside: distance of R from the tried range, in doublings; 0 inside the range.
      tried: the tried range of R.
      parameters: size of the smallest and the largest model of the source; None if unknown.
      table: summary of the fitted cells (metric, cells, budget, noise); None for "rules".
      surface: the recommendation with its uncertainty; None for "rules".
      measured: alpha -> mean score and number of seeds of the cells at R; None for "rules".
      stopping: comparison with shorter causal training; None for "rules" and for R = 1.
    """

    repetitions: float
    alpha: float
    source: str
    doublings_outside: float
    tried: tuple[float, float]
    parameters: tuple[int, int] | None
    table: dict | None = None
    surface: Recommendation | None = None
    measured: dict[float, tuple[float, int]] | None = None
    stopping: Stopping | None = None


def advise(
    repetitions: float, sweep: epath.PathLike | None = None, metric: str | None = None
) -> list[Advice]:
    """Returns the advice of each source; the first one is the one to follow.

    Args:
      repetitions: R.
      sweep: a sweep's folder or table, which takes precedence over the paper's rules. Without a sweep, the
        rules come first, and the shipped table second if the extra `analysis` is installed: installing the
        extra does not change the first answer.
      metric: column of the table to optimize.

    Raises:
      UserError: if the table has too few finished cells with `metric`.
    """
    by_rules = advise_by_rules(repetitions)
    if sweep:
        return [advise_by_table(load(sweep), metric or DEFAULT_METRIC, repetitions), by_rules]
    if all(map(find_spec, ("pandas", "sklearn"))):
        return [by_rules, advise_by_table(load(SHIPPED), metric or DEFAULT_METRIC, repetitions)]
    if metric:
        raise UserError(f"--metric={metric} needs pandas and scikit-learn; run {INSTALL}")
    return [by_rules]


def advise_by_rules(repetitions: float) -> Advice:
    """Returns the advice of the paper's rules."""
    return Advice(
        repetitions=repetitions,
        alpha=paper_rules.rule_alpha(repetitions),
        source="rules",
        doublings_outside=doublings_outside(repetitions, *paper_rules.TRIED_REPETITIONS),
        tried=paper_rules.TRIED_REPETITIONS,
        parameters=(paper_rules.PARAMETERS, paper_rules.PARAMETERS),
    )


def advise_by_table(table: DataFrame, metric: str, repetitions: float) -> Advice:
    """Returns the advice of a surface fitted to a table of cells.

    Raises:
      UserError: if the table has too few finished cells with `metric`.
    """
    cells = comparable(table, metric)
    surface = fit_to_cells(cells, metric)
    recommendation = surface.recommend(repetitions)
    parameters = cells["parameters"].dropna()
    here = cells[cells["repetitions"] == repetitions].groupby("alpha")[metric]
    return Advice(
        repetitions=repetitions,
        alpha=recommendation.alpha,
        source="surface",
        doublings_outside=recommendation.doublings_outside,
        tried=(float(surface.repetitions_C.min()), float(surface.repetitions_C.max())),
        parameters=(int(parameters.min()), int(parameters.max())) if len(parameters) else None,
        table={
            "metric": metric,
            "lower_is_better": surface.lower_is_better,
            "cells": len(cells),
            "budget_tokens": int(cells["budget_tokens"].iloc[0]),
            # Without repeated seeds, a surface fits part of the noise and underestimates it.
            "noise_sd": max(surface.noise_sd, seed_sd(cells, metric) or 0.0),
            "unequally_tuned": unequal_tuning(table, metric),
        },
        surface=recommendation,
        measured={alpha: (float(scores.mean()), len(scores)) for alpha, scores in here},
        stopping=compare_lengths(table, metric, repetitions) if repetitions > 1 else None,
    )


def fit_to_cells(cells: DataFrame, metric: str) -> Surface:
    """Fits a surface to the cells from `table.comparable`."""
    return fit_surface(
        cells["repetitions"], cells["alpha"], cells[metric], lower_is_better=lower_is_better(metric)
    )
