"""Scoring modes: conversion of an item to sequences, each scored with one forward pass."""

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
class ScoringParams:
    """Scoring parameters.

    The modes are:

    - causal: log-likelihood, the sum of log p(w_i | c, w_<i).
    - prefix: the same with bidirectional attention within the context.
    - masked: pseudo-log-likelihood. Token w_i is predicted with w_i and the n - 1 tokens after it masked, and
      all other tokens visible; averaged over the values of n in `masks` (arXiv 2512.14549, eq. 10).
    - monte_carlo: negative NELBO, estimated by masking l random tokens of the completion, with l stratified
      over 1..T (LLaDA, arXiv 2502.09992). The random numbers depend only on `seed` and the completion.

    Attributes:
      mode: one of `MODES`.
      masks: values of n in the mode "masked".
      samples: draws per item in the mode "monte_carlo".
      max_length: maximum number of tokens of a sequence; longer contexts are truncated on the left.
      seed: seed of the mode "monte_carlo".
    """

    mode: str
    masks: tuple[int, ...] = (1,)
    samples: int = 128
    max_length: int = 1024
    seed: int = 0

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"unknown mode {self.mode!r}; choose from {', '.join(MODES)}")
        if not self.masks or min(self.masks) < 1 or self.samples < 1:
            raise UserError(f"masks={self.masks} and samples={self.samples} must be at least 1")

    def settings(self) -> dict:
        """Returns the parameters that this mode uses, for the results file."""
        used = {"masked": ["masks"], "monte_carlo": ["samples", "seed"]}.get(self.mode, [])
        return {name: getattr(self, name) for name in ("mode", "max_length", *used)}


class ScoredSequence(NamedTuple):
    """A sequence to score with one forward pass.

    Attributes:
      item: index of its item.
      tokens: input token ids.
      positions: positions whose logits are scored.
      targets: target token id at each of these positions.
      weight: factor on the sum of the targets' log-probabilities in the item's score.
    """

    item: int
    tokens: list[int]
    positions: Sequence[int]
    targets: list[int]
    weight: float


def make_sequences(
    item: int, context: list[int], completion: list[int], scoring: ScoringParams, mask: int
) -> list[ScoredSequence]:
    """Returns the sequences whose weighted sum is the score of an item.

    Args:
      item: index of the item.
      context: token ids, `<s>` first.
      completion: token ids, at least one.
      scoring: scoring parameters.
      mask: id of `<mask>`.
    """
    return _MAKE_SEQUENCES[scoring.mode](item, context, completion, scoring=scoring, mask=mask)


def _masked_sequences(item, context, completion, *, scoring, mask) -> list[ScoredSequence]:
    sequences = []
    for i, target in enumerate(completion):
        # Near the end, several values of n mask the same tokens; these share a forward pass.
        for hidden, count in Counter(min(n, len(completion) - i) for n in scoring.masks).items():
            tokens = context + completion[:i] + [mask] * hidden + completion[i + hidden :]
            position, weight = len(context) + i - 1, count / len(scoring.masks)
            sequences.append(ScoredSequence(item, tokens, [position], [target], weight))
    return sequences


def _monte_carlo_sequences(item, context, completion, *, scoring, mask) -> list[ScoredSequence]:
    # Seeded without the context, so that both terms of acc_uncond use the same masks (lower variance).
    rng = np.random.default_rng((scoring.seed, zlib.crc32(np.array(completion, np.int32).tobytes())))
    size = len(completion)
    # Stratified sampling of l: equal shares of the samples go to equal shares of 1..size.
    uniform_S = (np.arange(scoring.samples) + rng.random(scoring.samples)) / scoring.samples
    num_masks_S = 1 + np.floor(uniform_S * size).astype(int)
    draws = Counter(tuple(np.sort(rng.permutation(size)[:num_masks]).tolist()) for num_masks in num_masks_S)
    sequences = []
    for chosen, count in draws.items():
        hidden = list(completion)
        for i in chosen:
            hidden[i] = mask
        positions = [len(context) + i - 1 for i in chosen]
        targets = [completion[i] for i in chosen]
        weight = count * size / len(chosen) / scoring.samples
        sequences.append(ScoredSequence(item, context + hidden, positions, targets, weight))
    return sequences


_MAKE_SEQUENCES = {
    "masked": _masked_sequences,
    "monte_carlo": _monte_carlo_sequences,
}
