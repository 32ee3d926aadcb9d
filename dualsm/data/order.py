"""The order of rows in a run that repeats its data: pure index arithmetic, no files.

With a budget of D training tokens and R repetitions a run sees the first U = ceil(D/R) tokens of the
corpus, R times. Its stream is R passes of U tokens, one after another; each pass holds the same documents
in a fresh random order (the last document is cut so that a pass has exactly U tokens). Row k of the stream
is the tokens [k*L, k*L + L], and the rows of a pass are visited in random order too: a document that is
longer than a batch would otherwise be all that the model sees for many steps.

Nothing is walked through to find a row, so any step can be the first.
"""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import numpy as np

from dualsm.process.errors import UserError


class Segments(NamedTuple):
    """Rows as pieces of documents, S of them, in order.

    Attributes:
      row_S: number of the row, counted within those asked for.
      document_S: index of the document in the corpus.
      start_S, stop_S: the tokens of that document which the piece holds.
      occurrence_S: number of the document within the stream; differs between documents, and between
        repetitions of one.
    """

    row_S: np.ndarray
    document_S: np.ndarray
    start_S: np.ndarray
    stop_S: np.ndarray
    occurrence_S: np.ndarray


class RowOrder:
    """Where the rows of a run lie in its corpus.

    Attributes:
      budget: D, tokens of the run.
      unique: U, different tokens among them.
      rows: ceil(D/L), rows of the run.
    """

    def __init__(
        self,
        lengths_N: np.ndarray,
        budget: int,
        seq_len: int,
        repetitions: int = 1,
        seed: int | None = None,
    ):
        """
        Args:
          lengths_N: tokens of each document of the corpus, in its order.
          budget: D.
          seq_len: L.
          repetitions: R; each of the first ceil(D/R) tokens comes R times (where R does not divide D,
            the last pass ends up to R - 1 tokens early).
          seed: decides the order of documents and rows in each pass; None keeps the corpus's own.

        Raises:
          UserError: when the corpus holds fewer than ceil(D/R) tokens.
        """
        self.budget, self.unique, self.rows = budget, -(-budget // repetitions), -(-budget // seq_len)
        self._seq_len, self._seed = seq_len, seed
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
        self._documents_of_pass = functools.lru_cache(maxsize=2)(self._shuffle_documents)
        self._rows_of_pass = functools.lru_cache(maxsize=2)(self._shuffle_rows)

    def segments(self, row_B: np.ndarray) -> Segments:
        """The pieces of documents that the given rows hold, each row L + 1 tokens (fewer at the end of the
        stream). Thread-safe.

        Args:
          row_B: numbers of rows in the order in which the run visits them, in [0, rows).
        """
        with self._lock:
            start_B = self._places(np.asarray(row_B, np.int64)) * self._seq_len
            stop_B = np.minimum(start_B + self._seq_len + 1, self.budget)
            # A row that crosses the border between passes has a part in each.
            first_B, last_B = start_B // self.unique, (stop_B - 1) // self.unique
            row_P, part_P = _ranges(last_B - first_B + 1)
            pass_P = first_B[row_P] + part_P
            start_P = np.maximum(start_B[row_P], pass_P * self.unique)
            stop_P = np.minimum(stop_B[row_P], (pass_P + 1) * self.unique)
            pieces = [
                self._within_pass(number, row_P[mine], start_P[mine], stop_P[mine])
                for number in np.unique(pass_P).tolist()
                for mine in [pass_P == number]
            ]
        joined = Segments(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))
        order_S = np.argsort(joined.row_S, kind="stable")  # pieces of one row are in order already
        return Segments(*(array[order_S] for array in joined))

    def _places(self, row_B: np.ndarray) -> np.ndarray:
        """Where in the stream the rows lie, counted in rows."""
        pass_B = row_B * self._seq_len // self.unique
        place_B = np.empty_like(row_B)
        for number in np.unique(pass_B).tolist():
            mine = pass_B == number
            first = self._first_row(number)
            place_B[mine] = first + self._rows_of_pass(number)[row_B[mine] - first]
        return place_B

    def _first_row(self, number: int) -> int:
        """The first row that begins in a pass."""
        return min(-(-number * self.unique // self._seq_len), self.rows)

    def _shuffle_rows(self, number: int) -> np.ndarray:
        return _permutation(self._first_row(number + 1) - self._first_row(number), self._seed, 2 * number + 1)

    def _within_pass(self, number: int, row_P, start_P, stop_P) -> Segments:
        """Pieces of documents for stretches [start, stop) of the stream that lie in one pass."""
        order_N, ends_N = self._documents_of_pass(number)
        start_P, stop_P = start_P - number * self.unique, stop_P - number * self.unique
        first_P = np.searchsorted(ends_N, start_P, side="right")
        last_P = np.searchsorted(ends_N, stop_P, side="left")
        part_S, offset_S = _ranges(last_P - first_P + 1)
        place_S = first_P[part_S] + offset_S
        document_S = order_N[place_S]
        length_S = self._lengths_N[document_S]
        begin_S = ends_N[place_S] - length_S
        return Segments(
            row_S=row_P[part_S],
            document_S=document_S,
            start_S=np.maximum(start_P[part_S] - begin_S, 0),
            stop_S=np.minimum(stop_P[part_S] - begin_S, length_S),
            occurrence_S=number * len(order_N) + place_S,
        )

    def _shuffle_documents(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of a pass in their order, and where in the pass each ends."""
        order_N = _permutation(len(self._lengths_N), self._seed, 2 * number)
        return order_N, np.cumsum(self._lengths_N[order_N])


def _ranges(size_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenated ranges of the given sizes: which range each element belongs to, and its place there."""
    part_S = np.repeat(np.arange(len(size_P)), size_P)
    return part_S, np.arange(len(part_S)) - np.repeat(np.cumsum(size_P) - size_P, size_P)


def _permutation(size: int, seed: int | None, number: int) -> np.ndarray:
    """A random order of 0..size-1: by a bijective hash of (seed, number, index), which unlike NumPy's own
    permutations is the same in every version of NumPy."""
    if seed is None:
        return np.arange(size)
    keys = np.arange(size, dtype=np.uint64)
    for word in (seed, number):
        keys = _splitmix64(keys ^ _splitmix64(np.uint64(word % 2**64)))
    return np.argsort(keys)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
