"""The modes a completion can be scored in. A mode is how an item becomes rows, one forward each."""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dualsm.process.errors import UserError

MODES = ("causal", "prefix", "masked", "monte_carlo")


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How to score.

    Attributes:
      mode: one of `MODES`. causal: sum of log p(w_i | c, w_<i). prefix: the same with the context seen
        bidirectionally. masked: pseudo-log-likelihood, each token from both sides with n masks from it on
        (arXiv 2512.14549, eq. 10), averaged over `masks`. monte_carlo: bound on the log-likelihood by
        masking l of the completion's tokens, l stratified over 1..length (LLaDA, arXiv 2502.09992); the
        draws follow from `seed` and the completion's tokens, so they do not depend on the other items.
      masks: the numbers n.
      samples: draws of monte_carlo for each item.
      longest: most tokens of a text; longer contexts lose their beginning.
      seed: of monte_carlo.
    """

    mode: str
    masks: tuple[int, ...] = (1,)
    samples: int = 128
    longest: int = 1024
    seed: int = 0

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"mode {self.mode!r} is none of {', '.join(MODES)}")
        if not self.masks or min(self.masks) < 1 or self.samples < 1:
            raise UserError(f"masks={self.masks} and samples={self.samples} must be at least 1")

    def settings(self) -> dict:
        """What decides the scores in this mode, for the record."""
        used = {"masked": ["masks"], "monte_carlo": ["samples", "seed"]}.get(self.mode, [])
        return {name: getattr(self, name) for name in ("mode", "longest", *used)}


class Row(NamedTuple):
    """One forward.

    Attributes:
      item: number of the item it belongs to.
      tokens: what the model sees.
      prefix_end: that many of them are seen from everywhere before it.
      positions: the scored ones; each predicts the token after it.
      targets: those tokens.
      weight: of the sum of their log-probabilities in the item's score.
    """

    item: int
    tokens: list[int]
    prefix_end: int
    positions: Sequence[int]
    targets: list[int]
    weight: float


def make_rows(item: int, context: list[int], completion: list[int], scoring: Scoring, mask: int) -> list[Row]:
    """The rows whose weighted sum is an item's score.

    Args:
      item: its number.
      context: token ids, `<s>` first.
      completion: token ids, at least one.
      scoring: how to score.
      mask: id of `<mask>`.
    """
    return _ROWS[scoring.mode](item, context, completion, scoring=scoring, mask=mask)


def _causal_rows(item, context, completion, *, scoring, mask) -> list[Row]:
    positions = range(len(context) - 1, len(context) + len(completion) - 1)
    return [Row(item, (context + completion)[:-1], 0, positions, completion, 1.0)]


def _prefix_rows(item, context, completion, *, scoring, mask) -> list[Row]:
    (row,) = _causal_rows(item, context, completion, scoring=scoring, mask=mask)
    return [row._replace(prefix_end=len(context))]


def _masked_rows(item, context, completion, *, scoring, mask) -> list[Row]:
    rows = []
    for i, target in enumerate(completion):
        # Near the end different numbers of masks hide the same tokens; those forwards are shared.
        for hidden, times in Counter(min(n, len(completion) - i) for n in scoring.masks).items():
            tokens = context + completion[:i] + [mask] * hidden + completion[i + hidden :]
            place, weight = len(context) + i - 1, times / len(scoring.masks)
            rows.append(Row(item, tokens, len(tokens), [place], [target], weight))
    return rows


def _monte_carlo_rows(item, context, completion, *, scoring, mask) -> list[Row]:
    # From the completion alone: with another context it is masked alike, which steadies the difference.
    rng = np.random.default_rng((scoring.seed, zlib.crc32(np.array(completion, np.int32).tobytes())))
    size = len(completion)
    # l is stratified: equal parts of the samples go to equal parts of 1..size.
    uniform_S = (np.arange(scoring.samples) + rng.random(scoring.samples)) / scoring.samples
    counts_S = 1 + np.floor(uniform_S * size).astype(int)
    draws = Counter(tuple(np.sort(rng.permutation(size)[:count]).tolist()) for count in counts_S)
    rows = []
    for chosen, times in draws.items():
        hidden = list(completion)
        for i in chosen:
            hidden[i] = mask
        positions = [len(context) + i - 1 for i in chosen]
        targets = [completion[i] for i in chosen]
        weight = times * size / len(chosen) / scoring.samples
        rows.append(Row(item, context + hidden, len(context) + size, positions, targets, weight))
    return rows


_ROWS = {
    "causal": _causal_rows,
    "prefix": _prefix_rows,
    "masked": _masked_rows,
    "monte_carlo": _monte_carlo_rows,
}
