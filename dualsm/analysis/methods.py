"""Methods against overfitting at R = 128, confirmed on several corpora; see docs/reproduction.md."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dualsm.analysis.shipped_rows import read_rows

TABLE = Path(__file__).with_name("methods.csv")  # written by docs/reproduction/page.py


class ConfirmedMethod(NamedTuple):
    """A method with the settings that were best for it, at its best stop.

    All methods have the same corpora, seeds and hardware.

    Attributes:
      repetitions: R of a run with the whole budget.
      method: "causal", "mixture", each with or without " dropout", "mir", or "causal finer": a weight decay
        that was tried after the study, without early stop.
      dropout: dropout rate.
      alpha: share of causal rows; all others are masked diffusion. 1 for "mir".
      weight_decay: weight decay.
      length: share of the budget that was trained, with a complete learning-rate schedule.
      compute: relative to a causal run with the whole budget.
      replicates: number of runs, on several corpora.
      corpora: number of corpora.
      causal, causal_error: held-out causal loss in nats per token, and its standard error over corpora.
      masked, masked_error: the same of the masked-diffusion loss.
      causal_change, causal_change_error: causal loss minus that of the mixture without dropout, with the same
        corpora and seeds, and its standard error; 0 for the mixture itself.
    """

    repetitions: int
    method: str
    dropout: float
    alpha: float
    weight_decay: float
    length: float
    compute: float
    replicates: int
    corpora: int
    causal: float
    causal_error: float
    masked: float
    masked_error: float
    causal_change: float
    causal_change_error: float


def read_methods(path: Path = TABLE) -> dict[str, ConfirmedMethod]:
    """Returns the rows of the table by method."""
    return {row.method: row for row in read_rows(path, ConfirmedMethod)}
