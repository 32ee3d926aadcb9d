"""What the paper found about repetition and mixture: three rows of its results and its rules, as data."""

from __future__ import annotations

import math
from typing import NamedTuple

SOURCE = "Dual-objective Language Models, arXiv 2512.14549"
# Its scores are zero-shot averages of nine tasks with 0 for guessing and 100 for perfect, of models with 470M
# parameters trained on 32B tokens.
PARAMETERS = 470_000_000
TRIED_REPETITIONS = (1, 256)
ALPHA_OF_FEW_REPETITIONS = 63 / 64
FEW_REPETITIONS, MANY_REPETITIONS = 16, 32
CAUSAL_REPETITIONS = 16  # that data may see under the causal objective, when it sees many


class Row(NamedTuple):
    """The best mixture at one number of repetitions, and zero-shot scores.

    Attributes:
      repetitions: R.
      alpha: the best of the paper's grid.
      dual_causal, dual_prefix: scores of that model in causal and in prefix mode.
      causal_only: score of the model with alpha = 1.
    """

    repetitions: int
    alpha: float
    dual_causal: float
    causal_only: float
    dual_prefix: float


ROWS = (
    Row(1, 63 / 64, 26.9, 26.1, 27.9),
    Row(32, 3 / 4, 23.9, 22.0, 25.0),
    Row(128, 1 / 8, 19.1, 9.4, 20.5),
)


def rule_alpha(repetitions: float) -> float:
    """The alpha of the paper's rules: 63/64 up to 16 repetitions, 16 / R from 32 on.

    Between 16 and 32, where the paper says nothing, alpha falls linearly in log2(R). At R = 32 the rule is
    one step of the paper's grid below the best model found there (1/2, not 3/4).
    """
    if repetitions <= FEW_REPETITIONS:
        return ALPHA_OF_FEW_REPETITIONS
    if repetitions >= MANY_REPETITIONS:
        return CAUSAL_REPETITIONS / repetitions
    at_many = CAUSAL_REPETITIONS / MANY_REPETITIONS
    way = math.log2(repetitions / FEW_REPETITIONS) / math.log2(MANY_REPETITIONS / FEW_REPETITIONS)
    return ALPHA_OF_FEW_REPETITIONS + way * (at_many - ALPHA_OF_FEW_REPETITIONS)
