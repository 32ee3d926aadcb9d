"""The order of tokens in a run that repeats its data: pure index arithmetic, no files.

With a budget of D training tokens and R repetitions a run sees the first U = ceil(D/R) tokens of the
corpus, R times: the stream of a run is R passes of U tokens, one after another, each pass the same
documents in a fresh random order (the last document is cut so that the pass has exactly U tokens).
Token n of the stream is found without walking through what comes before, so any step can be the first.
"""

from __future__ import annotations

import dataclasses
import functools
import threading

import numpy as np

from dualsm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Segments:
    """A stretch of the stream as pieces of documents, S of them, in order.

    Attributes:
      document_S: index of the document in the corpus.
      start_S, stop_S: the tokens of that document which the piece holds.
      occurrence_S: number of the document within the stream; differs between documents, and between
        repetitions of one.
    """

    document_S: np.ndarray
    start_S: np.ndarray
    stop_S: np.ndarray
    occurrence_S: np.ndarray


class RepeatedStream:
    """The stream of tokens of a run.

    Attributes:
      budget: D, tokens the run trains on.
      unique: U, different tokens among them.
    """

    def __init__(self, lengths_N: np.ndarray, budget: int, repetitions: int, seed: int):
        """
        Args:
          lengths_N: tokens of each document of the corpus, in its order.
          budget: D.
          repetitions: R; each of the first ceil(D/R) tokens comes R times (where R does not divide D,
            the last pass ends up to R - 1 tokens early).
          seed: decides the order of documents in each pass.

        Raises:
          UserError: when the corpus holds fewer than ceil(D/R) tokens.
        """
        self.budget, self.unique, self._seed = budget, -(-budget // repetitions), seed
        ends_N = np.cumsum(lengths_N, dtype=np.int64)
        available = int(ends_N[-1]) if len(ends_N) else 0
        if available < self.unique:
            raise UserError(
                f"the corpus has {available:,} training tokens but the run needs {self.unique:,} unique "
                f"ones ({budget:,} tokens / {repetitions} repetitions); raise config.repetitions to "
                f"{-(-budget // max(available, 1))} or more, lower config.steps, or prepare more text"
            )
        documents = int(np.searchsorted(ends_N, self.unique)) + 1
        self._lengths_N = lengths_N[:documents].astype(np.int64)
        self._lengths_N[-1] -= ends_N[documents - 1] - self.unique
        self._lock = threading.Lock()
        self._pass = functools.lru_cache(maxsize=2)(self._shuffle)

    def segments(self, start: int, stop: int) -> Segments:
        """Tokens [start, stop) of the stream, which must lie in [0, budget]. Thread-safe."""
        first, last = start // self.unique, (stop - 1) // self.unique
        parts = [self._within_pass(number, start, stop) for number in range(first, last + 1)]
        return Segments(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _within_pass(self, number: int, start: int, stop: int) -> tuple[np.ndarray, ...]:
        with self._lock:
            order_N, ends_N = self._pass(number)
        offset = number * self.unique
        start, stop = max(start - offset, 0), min(stop - offset, self.unique)
        first = int(np.searchsorted(ends_N, start, side="right"))
        last = int(np.searchsorted(ends_N, stop, side="left")) + 1
        document_S = order_N[first:last]
        begins_S = ends_N[first:last] - self._lengths_N[document_S]
        start_S = np.maximum(start - begins_S, 0)
        stop_S = np.minimum(stop - begins_S, self._lengths_N[document_S])
        return document_S, start_S, stop_S, number * len(order_N) + np.arange(first, last)

    def _shuffle(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of documents in a pass, and the end of each in the pass's tokens.

        Sorts the documents by a bijective hash of (seed, pass, index), which unlike NumPy's own
        permutations is the same in every version of NumPy.
        """
        keys_N = np.arange(len(self._lengths_N), dtype=np.uint64)
        for word in (self._seed, number):
            keys_N = _splitmix64(keys_N ^ _splitmix64(np.uint64(word % 2**64)))
        order_N = np.argsort(keys_N)
        return order_N, np.cumsum(self._lengths_N[order_N])


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
