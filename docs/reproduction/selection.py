"""Choices of the protocol, and means over the confirmed runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

LOSS, MASKED = "test_causal", "test_masked_diffusion"
DIVERGED = math.log(512)  # causal loss of a model that predicts all tokens with equal probability
CELL = ["recipe", "R", "alpha", "weight_decay", "length", "causal_weight", "size"]


class Chosen:
    """The choices of the protocol, made on corpus A and the dev split."""

    def __init__(self, runs: pd.DataFrame):
        tuned = runs[runs.stage.str.startswith("tune") & runs.dev_causal.notna()]
        self._tuned = tuned.to_dict("records")

    def best(self, recipe: str, R: int, alpha: float, kind: str) -> dict:
        """Returns the cell with the lowest causal loss; `kind` "full" or "stop"."""
        runs = [
            run
            for run in self._tuned
            if (run["recipe"], run["R"], run["alpha"]) == (recipe, R, alpha)
            and (kind == "stop" or run["length"] == 1)
        ]
        best = min(runs, key=lambda run: run["dev_causal"])
        return {key: best[key] for key in CELL}

    def loss(self, cell: dict) -> float:
        """Returns the causal loss of a cell on corpus A and the dev split."""
        return next(run["dev_causal"] for run in self._tuned if all(run[key] == cell[key] for key in CELL))

    def alphas(self, R: int, recipe: str = "plain") -> list[float]:
        """Returns the alphas with a full run that has a loss."""
        runs = (run for run in self._tuned if (run["recipe"], run["R"], run["length"]) == (recipe, R, 1))
        return sorted({run["alpha"] for run in runs})

    def mixture(self, R: int, kind: str, recipe: str = "plain") -> dict:
        """Returns the best cell of the best mixture."""
        cells = [self.best(recipe, R, alpha, kind) for alpha in self.alphas(R, recipe) if alpha < 1]
        return min(cells, key=self.loss)


class Replicates:
    """The confirmed runs, by cell, corpus and seed."""

    def __init__(self, runs: pd.DataFrame):
        self._runs: dict[tuple, dict[tuple, dict]] = {}
        for run in runs[runs.corpus != "A"].to_dict("records"):
            cell = tuple(run[key] for key in CELL)
            self._runs.setdefault(cell, {})[run["corpus"], run["seed"]] = run

    def values(self, cell: dict, column: str) -> dict[tuple, float]:
        """Returns a column of a cell by corpus and seed; NaN for runs that diverged."""
        runs = self._runs.get(tuple(cell[key] for key in CELL), {})
        return {key: run[column] if run[LOSS] < DIVERGED else math.nan for key, run in runs.items()}

    def cells(self, **settings) -> list[dict]:
        """Returns the cells with these settings."""
        cells = [dict(zip(CELL, values, strict=True)) for values in self._runs]
        return [cell for cell in cells if all(cell[key] == value for key, value in settings.items())]

    def common(self, cells: Iterable[dict]) -> set[tuple]:
        """Returns the corpora and seeds that all cells have."""
        return set.intersection(*(set(self.values(cell, LOSS)) for cell in cells))

    def paired(self, a: dict, b: dict, column: str) -> dict[tuple, float]:
        """Returns the difference of two cells by corpus and seed.

        Raises:
          ValueError: if the cells do not have the same replicates.
        """
        first, second = self.values(a, column), self.values(b, column)
        if first.keys() != second.keys():
            raise ValueError(f"{a} and {b} have different replicates")
        return {key: value - second[key] for key, value in first.items()}

    def difference(self, a: dict, b: dict, column: str) -> tuple[float, float]:
        """Returns the mean difference of two cells and its standard error over corpora."""
        return over_corpora(self.paired(a, b, column))

    def common_difference(self, a: dict, b: dict, column: str) -> tuple[float, float]:
        """Returns the difference over the corpora and seeds that both cells have."""
        first, second = self.values(a, column), self.values(b, column)
        return over_corpora({key: first[key] - second[key] for key in first.keys() & second.keys()})


def by_corpus(values: Mapping[tuple, float]) -> dict[str, float]:
    """Returns the mean over the seeds of each corpus that has a number, given values by corpus and seed."""
    seeds: dict[str, list[float]] = {}
    for (corpus, _), value in values.items():
        if not math.isnan(value):
            seeds.setdefault(corpus, []).append(value)
    return {corpus: float(np.mean(found)) for corpus, found in seeds.items()}


def over_corpora(values: Mapping[tuple, float]) -> tuple[float, float]:
    """Returns mean and standard error over corpora; seeds of a corpus are averaged first, without NaN."""
    means = list(by_corpus(values).values())
    return float(np.mean(means)), float(np.std(means, ddof=1) / len(means) ** 0.5)
