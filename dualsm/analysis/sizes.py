"""The mixture against causal rows only in models of several sizes; see docs/reproduction.md."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dualsm.analysis.shipped_rows import read_rows

TABLE = Path(__file__).with_name("sizes.csv")  # written by docs/reproduction/page.py


class SizeContrast(NamedTuple):
    """Two differences in held-out causal loss: the mixture minus causal rows only, in nats per token.

    The settings are those that were chosen for the models of the confirmed runs.

    Attributes:
      repetitions: R of a run with the whole budget.
      parameters, budget_tokens: size of the models, and tokens of a run with the whole budget.
      corpora: number of corpora, with one run per setting on each.
      compute_lowest, compute_highest: least and greatest difference over corpora at equal compute.
      stop_lowest, stop_highest: the same, each at its best stop.
    """

    repetitions: int
    parameters: int
    budget_tokens: int
    corpora: int
    compute_lowest: float
    compute_highest: float
    stop_lowest: float
    stop_highest: float


def read_sizes(path: Path = TABLE) -> list[SizeContrast]:
    """Returns the rows of the table by increasing size."""
    return read_rows(path, SizeContrast)
