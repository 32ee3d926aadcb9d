"""Counts and records of the drafts of self-speculative decoding."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np


class DraftArrays(NamedTuple):
    """One step of a batch of texts: a draft of P positions and its verification.

    Attributes:
      tokens_BxP: drafted tokens.
      size_B: number of drafted tokens of each text; later positions are ignored.
      kept_B: number of drafted tokens that each text keeps.
      next_B: the token that is drawn after the kept ones.
      next_kept_B: True if the text keeps `next_B`: it is neither finished before that token nor full.
      active_B: True if the text was not finished before the step.
    """

    tokens_BxP: jax.Array
    size_B: jax.Array
    kept_B: jax.Array
    next_B: jax.Array
    next_kept_B: jax.Array
    active_B: jax.Array


class DraftStep(NamedTuple):
    """One draft of one text.

    Attributes:
      accepted: drafted tokens that the text keeps.
      rejected: the other drafted tokens. The first one is rejected by the causal mode, and the others follow
        it; or all follow an accepted `</s>`.
      next_token: the token that is drawn after the accepted ones; None if the text ends before it.
    """

    accepted: list[int]
    rejected: list[int]
    next_token: int | None

    @property
    def tokens(self) -> list[int]:
        """The tokens that the step adds to the text."""
        return self.accepted if self.next_token is None else [*self.accepted, self.next_token]


@dataclasses.dataclass
class DraftCounts:
    """Number of drafts, and of drafted tokens that were kept."""

    drafts: int = 0
    accepted: int = 0


@dataclasses.dataclass
class DraftRecord(DraftCounts):
    """The drafts of each text, beside their counts.

    Recording reads the tokens of every draft from the device, so it is slower than counting.

    Attributes:
      steps: the drafts of each text, in order; `steps[i]` belongs to prompt i.
    """

    steps: list[list[DraftStep]] = dataclasses.field(default_factory=list)

    def add_texts(self, count: int) -> int:
        """Adds texts without drafts, and returns the index of the first one in `steps`."""
        self.steps += [[] for _ in range(count)]
        return len(self.steps) - count

    def add_step(self, first: int, arrays: DraftArrays) -> None:
        """Adds one step of a batch, whose first text has the index `first` in `steps`."""
        for row, (drafted_P, size, kept, token, next_kept, active) in enumerate(
            zip(*map(np.asarray, jax.device_get(arrays)), strict=True), first
        ):
            if active:
                accepted, rejected = drafted_P[:kept].tolist(), drafted_P[kept:size].tolist()
                self.steps[row].append(DraftStep(accepted, rejected, int(token) if next_kept else None))
