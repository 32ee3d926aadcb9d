"""The order of packed sequences in a run that repeats its data: index arithmetic, no files.

With a budget of D training tokens and R repetitions, a run sees the first U = ceil(D / R) tokens of the
corpus R times. Its token stream is the concatenation of R passes of U tokens. Each pass contains the same
documents in a new random order; the last document is cut so that a pass has exactly U tokens.
Sequence k of the stream consists of the tokens [k * L, k * L + L]. The sequences of a pass are visited in
random order too, because a document longer than a batch would otherwise fill several consecutive steps.

Finding a sequence takes no iteration over earlier ones, so a run can start at any step.
"""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import numpy as np

from dualsm.process.errors import UserError


class Segments(NamedTuple):
    """The S document segments that a batch of packed sequences consists of, in order.

    Attributes:
      row_S: index of the sequence within the batch.
      document_S: index of the document in the corpus.
      start_S, stop_S: token range of the segment within its document.
      instance_S: index of the document in the stream; differs between documents and between repetitions of
        the same document.
    """

    row_S: np.ndarray
    document_S: np.ndarray
    start_S: np.ndarray
    stop_S: np.ndarray
    instance_S: np.ndarray


class SequenceOrder:
    """Maps the sequences of a run to token ranges of documents.

    Attributes:
      budget: D, training tokens of the run.
      unique: U, unique tokens among them.
      num_sequences: ceil(D / L).
    """

    def __init__(
        self,
        lengths_N: np.ndarray,
        budget: int,
        seq_len: int,
        repetitions: int = 1,
        seed: int | None = None,
        unique: int = 0,
    ):
        """Selects the documents and checks that the corpus is large enough.

        Args:
          lengths_N: tokens of each document, in the order of the corpus.
          budget: D.
          seq_len: L.
          repetitions: R, passes over the first ceil(D / R) tokens. If R does not divide D, the last pass ends
            up to R - 1 tokens early.
          seed: seed of the order of documents and sequences in each pass; None keeps the corpus order.
          unique: U, at most D, in place of ceil(D / R); 0: ceil(D / R). If U does not divide D, the last pass
            is incomplete.

        Raises:
          UserError: if the corpus has fewer than ceil(D / R) tokens.
        """
        self.budget, self.unique = budget, unique or -(-budget // repetitions)
        self.num_sequences = -(-budget // seq_len)
        self._seq_len, self._seed = seq_len, seed
        ends_N = np.cumsum(lengths_N, dtype=np.int64)
        available = int(ends_N[-1]) if len(ends_N) else 0
        if available < self.unique:
            raise UserError(
                f"the corpus has {available:,} training tokens, but the run needs {self.unique:,} unique "
                f"tokens ({budget:,} tokens / {repetitions} repetitions); raise config.repetitions to "
                f"{-(-budget // max(available, 1))} or more, lower config.steps, or prepare more text"
            )
        documents = int(np.searchsorted(ends_N, self.unique)) + 1
        self._lengths_N = lengths_N[:documents].astype(np.int64)
        self._lengths_N[-1] -= ends_N[documents - 1] - self.unique
        self._lock = threading.Lock()
        self._documents_of = functools.lru_cache(maxsize=2)(self._shuffle_documents)
        self._sequences_of = functools.lru_cache(maxsize=2)(self._shuffle_sequences)

    def segments(self, index_B: np.ndarray) -> Segments:
        """Returns the document segments of the given sequences. Thread-safe.

        Each sequence has L + 1 tokens, the last one of the stream fewer.

        Args:
          index_B: indices of sequences in the order in which the run visits them, in [0, num_sequences).
        """
        with self._lock:
            start_B = self._stream_index(np.asarray(index_B, np.int64)) * self._seq_len
            stop_B = np.minimum(start_B + self._seq_len + 1, self.budget)
            # A sequence that crosses the border between repetitions has a range in each of them.
            first_B, last_B = start_B // self.unique, (stop_B - 1) // self.unique
            row_P, offset_P = _concatenated_ranges(last_B - first_B + 1)
            repetition_P = first_B[row_P] + offset_P
            start_P = np.maximum(start_B[row_P], repetition_P * self.unique)
            stop_P = np.minimum(stop_B[row_P], (repetition_P + 1) * self.unique)
            segments = [
                self._within_repetition(repetition, row_P[selected], start_P[selected], stop_P[selected])
                for repetition in np.unique(repetition_P).tolist()
                for selected in [repetition_P == repetition]
            ]
        joined = Segments(*(np.concatenate(arrays) for arrays in zip(*segments, strict=True)))
        order_S = np.argsort(joined.row_S, kind="stable")  # segments of one sequence are already in order
        return Segments(*(array[order_S] for array in joined))

    def _stream_index(self, index_B: np.ndarray) -> np.ndarray:
        """Maps indices in visiting order to indices in the stream."""
        repetition_B = index_B * self._seq_len // self.unique
        stream_B = np.empty_like(index_B)
        for repetition in np.unique(repetition_B).tolist():
            selected = repetition_B == repetition
            first = self._first_sequence(repetition)
            stream_B[selected] = first + self._sequences_of(repetition)[index_B[selected] - first]
        return stream_B

    def _first_sequence(self, repetition: int) -> int:
        """Returns the index of the first sequence that starts in a repetition."""
        return min(-(-repetition * self.unique // self._seq_len), self.num_sequences)

    def _shuffle_sequences(self, repetition: int) -> np.ndarray:
        size = self._first_sequence(repetition + 1) - self._first_sequence(repetition)
        return _permutation(size, self._seed, 2 * repetition + 1)

    def _within_repetition(self, repetition: int, row_P, start_P, stop_P) -> Segments:
        """Returns the document segments of stream ranges [start, stop) within one repetition."""
        order_N, ends_N = self._documents_of(repetition)
        start_P, stop_P = start_P - repetition * self.unique, stop_P - repetition * self.unique
        first_P = np.searchsorted(ends_N, start_P, side="right")
        last_P = np.searchsorted(ends_N, stop_P, side="left")
        range_S, offset_S = _concatenated_ranges(last_P - first_P + 1)
        position_S = first_P[range_S] + offset_S
        document_S = order_N[position_S]
        length_S = self._lengths_N[document_S]
        document_start_S = ends_N[position_S] - length_S
        return Segments(
            row_S=row_P[range_S],
            document_S=document_S,
            start_S=np.maximum(start_P[range_S] - document_start_S, 0),
            stop_S=np.minimum(stop_P[range_S] - document_start_S, length_S),
            instance_S=repetition * len(order_N) + position_S,
        )

    def _shuffle_documents(self, repetition: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents of a repetition in order, and the end of each within the repetition."""
        order_N = _permutation(len(self._lengths_N), self._seed, 2 * repetition)
        return order_N, np.cumsum(self._lengths_N[order_N])


def _concatenated_ranges(size_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenates `range(size)` for all sizes; returns the index of the range and the value, per element."""
    range_S = np.repeat(np.arange(len(size_P)), size_P)
    return range_S, np.arange(len(range_S)) - np.repeat(np.cumsum(size_P) - size_P, size_P)


def _permutation(size: int, seed: int | None, stream: int) -> np.ndarray:
    """Returns a random permutation of 0..size-1, or the identity without a seed.

    Sorts by a bijective hash of (seed, stream, index). Unlike NumPy's permutations, the result is the same in
    every version of NumPy.
    """
    if seed is None:
        return np.arange(size)
    keys = np.arange(size, dtype=np.uint64)
    for word in (seed, stream):
        keys = _splitmix64(keys ^ _splitmix64(np.uint64(word % 2**64)))
    return np.argsort(keys)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
