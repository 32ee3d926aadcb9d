"""Findings that were not confirmed on other corpora; see docs/reproduction.md.

Dropout, at many repetitions, from the runs that chose the settings of the confirmed runs (tuned.csv). The
price of a small share of masked rows, at few repetitions, from an earlier sweep (shipped.csv).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from dualsm.analysis.advice import SHIPPED
from dualsm.analysis.scales import fraction

TUNED = Path(__file__).with_name("tuned.csv")  # written by docs/reproduction/page.py
FEW_REPETITIONS = 16
SMALL_SHARE = 1 / 64  # of masked rows


class TunedRun(NamedTuple):
    """The best tuning run of a method, one run on one corpus.

    Attributes:
      repetitions: R of a run with the whole budget.
      method: "causal", "mixture" or "mir", followed by " dropout" for runs with dropout.
      dropout: dropout rate.
      alpha: share of causal rows; all others are masked diffusion. 1 for "mir".
      weight_decay: weight decay.
      length: share of the budget that was trained, with a complete learning-rate schedule.
      compute: relative to a causal run with the whole budget.
      causal, masked: losses on the test split, in nats per token.
    """

    repetitions: int
    method: str
    dropout: float
    alpha: float
    weight_decay: float
    length: float
    compute: float
    causal: float
    masked: float


class SmallShare(NamedTuple):
    """Price and gain of a small share of masked rows, at few repetitions and at equal compute.

    Attributes:
      masked_share: share of masked rows.
      repetitions: R of the runs.
      causal_changes: causal loss minus that of causal rows only, in nats per token, mean over the seeds of
        each R.
      masked: masked-diffusion loss in nats per token, mean over the seeds of each R.
      seeds: number of seeds of each R.
    """

    masked_share: float
    repetitions: tuple[int, ...]
    causal_changes: tuple[float, ...]
    masked: tuple[float, ...]
    seeds: tuple[int, ...]


class Unconfirmed(NamedTuple):
    """Findings that were not confirmed.

    Attributes:
      tuned: the best tuning run of each method.
      small_share: the price of a small share of masked rows; None where R is larger than `FEW_REPETITIONS`.
    """

    tuned: dict[str, TunedRun]
    small_share: SmallShare | None


def unconfirmed(repetitions: float) -> Unconfirmed:
    """Returns the findings of the tables that come with dualsm, for a question with R repetitions."""
    return Unconfirmed(read_tuned(), small_share() if repetitions <= FEW_REPETITIONS else None)


def describe_unconfirmed(found: Unconfirmed) -> list[str]:
    """Returns the findings as lines of text."""
    causal, mixture, both = (found.tuned[name] for name in ("causal dropout", "mixture", "mixture dropout"))
    lines = [
        f"    not confirmed (R = {causal.repetitions}, one corpus, one seed): causal training with dropout "
        f"{causal.dropout:g} and weight decay {causal.weight_decay:g} has causal and masked-diffusion losses "
        f"of {_losses(causal)}; the mixture without dropout has {_losses(mixture)}, with dropout "
        f"{_losses(both)}"
    ]
    price = found.small_share
    if price:
        masked = fraction(price.masked_share)
        lines.append(
            f"    not confirmed (R = {span(price.repetitions, '')}, one corpus, {span(price.seeds, '')} "
            f"seeds): a share of {masked} masked rows changes the causal loss by "
            f"{span(price.causal_changes, '+.3f')}; the masked-diffusion loss is then "
            f"{span(price.masked, '.1f')}"
        )
    return lines


def _losses(run: TunedRun) -> str:
    length = "" if run.length == 1 else f" (stopped at {fraction(run.length)} of the tokens)"
    return f"{run.causal:.3f} and {run.masked:.3f}{length}"


def span(values: Iterable[float], form: str) -> str:
    """Returns the text of the lowest and the highest value, once if both have the same text."""
    values = list(values)
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values))))


def read_tuned(path: Path = TUNED) -> dict[str, TunedRun]:
    """Returns the runs of the table by method."""
    types = dict.fromkeys(TunedRun._fields, float) | {"repetitions": int, "method": str}
    with path.open(newline="") as file:
        rows = [{name: types[name](text) for name, text in row.items()} for row in csv.DictReader(file)]
    return {row["method"]: TunedRun(**row) for row in rows}


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
    pairs: dict[int, list[tuple[float, float]]] = {}
    for key in sorted(mixed.keys() & causal.keys()):
        loss, only = (float(found[key]["valid/causal/loss"]) for found in (mixed, causal))
        pairs.setdefault(key[0], []).append((loss - only, float(mixed[key]["valid/masked_diffusion/loss"])))
    found = [(R, *map(fmean, zip(*values, strict=True)), len(values)) for R, values in pairs.items()]
    return SmallShare(SMALL_SHARE, *zip(*found, strict=True))


def read_cells(path: Path = SHIPPED) -> list[dict[str, str]]:
    """Returns the rows of a table of cells."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
