"""The number of tokens per draft of self-speculative decoding: fixed, or adapted to the acceptance rate."""

from __future__ import annotations

import math

import numpy as np

ADAPTIVE_SIZES = (2, 4, 8, 16)  # compiled sizes; 1 would never test a token that a mask predicts
# Adaptive drafts end at the last token whose probability of being accepted is at least this.
_MIN_ACCEPTANCE = 0.15
_PRIOR = (1.0, 2.0)  # pseudo-counts of accepted and of tested tokens


def draft_sizes(fixed: int, rate_Bx2: np.ndarray, active_B: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns the number of tokens per draft of each text, int32 [B], and the compiled size.

    Args:
      fixed: K; 0: adaptive.
      rate_Bx2: counts of accepted and tested tokens that masks predicted.
      active_B: True if the text is not finished.
    """
    if fixed:
        return np.full(len(active_B), fixed, np.int32), fixed
    draft_B = adapted_draft(rate_Bx2)
    longest = draft_B[active_B].max()
    return draft_B, next(size for size in ADAPTIVE_SIZES if size >= longest)


def adapted_draft(rate_Bx2: np.ndarray) -> np.ndarray:
    """Returns K, the number of tokens per draft, from the counts of accepted and tested tokens, int32 [B].

    The first token is always accepted. If each token that a mask predicts is accepted with probability r, the
    first K tokens are all accepted with probability r^(K - 1). The result is the largest K for which this
    probability is at least `_MIN_ACCEPTANCE`.
    """
    rate_B = (rate_Bx2[:, 0] + _PRIOR[0]) / (rate_Bx2[:, 1] + _PRIOR[1])
    size_B = 1 + np.floor(math.log(_MIN_ACCEPTANCE) / np.log(np.clip(rate_B, 1e-6, 1 - 1e-6)))
    return np.clip(size_B, ADAPTIVE_SIZES[0], ADAPTIVE_SIZES[-1]).astype(np.int32)
