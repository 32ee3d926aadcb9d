"""The paper's results and rules for the mixture under repetition."""

from __future__ import annotations

import math
from typing import NamedTuple

SOURCE = "Dual-objective Language Models, arXiv 2512.14549"
# Scores are zero-shot averages over nine tasks, scaled to 0 for chance and 100 for perfect, of models with
# 470M parameters trained on 32B tokens.
PARAMETERS = 470_000_000
TRIED_REPETITIONS = (1, 256)
ALPHA_OF_FEW_REPETITIONS = 63 / 64
FEW_REPETITIONS, MANY_REPETITIONS = 16, 32
CAUSAL_REPETITIONS = 16  # repetitions under the causal objective if the data is repeated often


class PaperResult(NamedTuple):
    """The best mixture at one number of repetitions, and its zero-shot scores.

    Attributes:
      repetitions: R.
      alpha: the best value of the paper's grid.
      dual_causal, dual_prefix: scores of the best model in causal mode and in prefix mode.
      causal_only: score of the model with alpha = 1.
    """

    repetitions: int
    alpha: float
    dual_causal: float
    causal_only: float
    dual_prefix: float


PAPER_RESULTS = (
    PaperResult(1, 63 / 64, 26.9, 26.1, 27.9),
    PaperResult(32, 3 / 4, 23.9, 22.0, 25.0),
    PaperResult(128, 1 / 8, 19.1, 9.4, 20.5),
)


def rule_alpha(repetitions: float) -> float:
    """Returns alpha by the paper's rules: 63/64 up to 16 repetitions, 16 / R from 32 repetitions.

    The paper has no rule between 16 and 32; there alpha falls linearly in log2(R). At R = 32 the rule (1/2)
    is one step of the paper's grid below the best model at that R (3/4).
    """
    if repetitions <= FEW_REPETITIONS:
        return ALPHA_OF_FEW_REPETITIONS
    if repetitions >= MANY_REPETITIONS:
        return CAUSAL_REPETITIONS / repetitions
    at_many = CAUSAL_REPETITIONS / MANY_REPETITIONS
    progress = math.log2(repetitions / FEW_REPETITIONS) / math.log2(MANY_REPETITIONS / FEW_REPETITIONS)
    return ALPHA_OF_FEW_REPETITIONS + progress * (at_many - ALPHA_OF_FEW_REPETITIONS)


def causal_share_of_loss(alpha: float) -> float:
    """Returns the share of the causal loss in the paper's loss, which counts the causal loss twice."""
    return 2 * alpha / (1 + alpha)
