"""The price of a small share of masked rows at few repetitions, from an earlier sweep (shipped.csv).

It was not confirmed on other corpora; see docs/reproduction.md.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from dualsm.analysis.advice import SHIPPED
from dualsm.analysis.scales import fraction

FEW_REPETITIONS = 16
SMALL_SHARE = 1 / 64  # of masked rows


class SmallShare(NamedTuple):
    """Price and gain of a small share of masked rows, at few repetitions and at equal compute.

    Attributes:
      masked_share: share of masked rows.
      repetitions: R of the runs.
      causal_changes: causal loss minus that of causal rows only, in nats per token, mean over the seeds of
        each R.
      masked_changes: the same of the masked-diffusion loss.
      masked: masked-diffusion loss in nats per token, mean over the seeds of each R.
      seeds: number of seeds of each R.
    """

    masked_share: float
    repetitions: tuple[int, ...]
    causal_changes: tuple[float, ...]
    masked_changes: tuple[float, ...]
    masked: tuple[float, ...]
    seeds: tuple[int, ...]


def price_at(repetitions: float) -> SmallShare | None:
    """Returns the price at few repetitions; None for more than `FEW_REPETITIONS`."""
    return small_share() if repetitions <= FEW_REPETITIONS else None


def describe_small_share(price: SmallShare) -> str:
    """Returns the price as a line of text."""
    return (
        f"    for a second mode at R = {span(price.repetitions, '')}, train with: "
        f"causal {fraction(1 - price.masked_share)}, masked_diffusion {fraction(price.masked_share)}; not "
        f"confirmed (one corpus, {span(price.seeds, '')} seeds): it changes the causal loss by "
        f"{span(price.causal_changes, '+.3f')} and the masked-diffusion loss by "
        f"{span(price.masked_changes, '+.1f')}"
    )


def span(values: Iterable[float], form: str) -> str:
    """Returns the text of the lowest and the highest value, once if both have the same text."""
    values = list(values)
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values))))


def small_share(cells: Iterable[Mapping] | None = None) -> SmallShare:
    """Returns the price of a small share of masked rows in a table of cells.

    Cells are compared in pairs with the same R, up to `FEW_REPETITIONS`, the same seed and settings, and the
    whole budget.

    Args:
      cells: rows of the table; None: the table that comes with dualsm.
    """
    settings = ("seed", "optimizer.weight_decay", "optimizer.learning_rate")
    cells = read_cells() if cells is None else list(cells)
    budget = max(float(cell["budget_tokens"]) for cell in cells)
    by_alpha: dict[float, dict[tuple, Mapping]] = {1 - SMALL_SHARE: {}, 1.0: {}}
    for cell in cells:
        alpha, repetitions = float(cell["alpha"] or "nan"), int(float(cell["repetitions"]))
        whole = float(cell["budget_tokens"]) == budget and cell["status"] == "done"
        if whole and repetitions <= FEW_REPETITIONS and alpha in by_alpha:
            by_alpha[alpha][repetitions, *(float(cell[name]) for name in settings)] = cell
    mixed, causal = by_alpha.values()
    pairs: dict[int, list[tuple[float, float, float]]] = {}
    for key in sorted(mixed.keys() & causal.keys()):
        losses, only = (_losses(found[key]) for found in (mixed, causal))
        changes = (loss - other for loss, other in zip(losses, only, strict=True))
        pairs.setdefault(key[0], []).append((*changes, losses[1]))
    found = [(R, *map(fmean, zip(*values, strict=True)), len(values)) for R, values in pairs.items()]
    return SmallShare(SMALL_SHARE, *zip(*found, strict=True))


def _losses(cell: Mapping) -> tuple[float, float]:
    """Returns the causal and the masked-diffusion loss of a cell."""
    return float(cell["valid/causal/loss"]), float(cell["valid/masked_diffusion/loss"])


def read_cells(path: Path = SHIPPED) -> list[dict[str, str]]:
    """Returns the rows of a table of cells."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
