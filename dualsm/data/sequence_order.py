"""The order of packed sequences in a run that repeats its data: index arithmetic on document lengths.

With a budget of D training tokens and R repetitions, a run sees the first U = ceil(D / R) tokens of the
corpus R times. Its token stream is the concatenation of R passes of U tokens. Each pass contains the same
documents in a new random order; the last document is cut so that a pass has exactly U tokens.

The order has two levels. Each pass puts the groups of `DocumentLengths` into a random order and divides them
into windows of at most `WINDOW_GROUPS` groups; the documents of a window are shuffled. Up to 2^20 documents
are in one window, and are shuffled as a whole. Only the windows in use are in memory, so that memory and the
time to the first batch do not grow with the corpus.

Sequence k of the stream consists of the tokens [k * L, k * L + L]. The sequences that start in a window are
visited in random order too, because a document longer than a batch would otherwise fill several consecutive
steps.

Finding a sequence takes no iteration over earlier ones, so a run can start at any step.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dualsm.data.document_lengths import DocumentLengths
from dualsm.data.permutations import permutation, permute
from dualsm.process.errors import UserError

ORDER_VERSION = 2  # runs continue only in the order that they started with
WINDOW_GROUPS = 64  # 2^20 documents
_CACHED = 3  # windows, and passes
_GROUPS, _DOCUMENTS, _SEQUENCES = range(3)  # the permutations of a pass


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


class _Pass(NamedTuple):
    """The W windows of a pass.

    Attributes:
      groups: groups of documents of each window, in the order of the pass.
      token_W1, document_W1: first token and first document of each window within the pass, and their number
        in the whole pass.
    """

    groups: list[np.ndarray]
    token_W1: np.ndarray
    document_W1: np.ndarray


class _Window(NamedTuple):
    """The N documents of a window in order, and the end of each in tokens after the start of the window."""

    document_N: np.ndarray
    end_N: np.ndarray


class SequenceOrder:
    """Maps the sequences of a run to token ranges of documents.

    Attributes:
      budget: D, training tokens of the run.
      unique: U, unique tokens among them.
      num_sequences: ceil(D / L).
    """

    def __init__(
        self,
        lengths: DocumentLengths,
        budget: int,
        seq_len: int,
        repetitions: int = 1,
        seed: int | None = None,
        unique: int = 0,
        window_groups: int = WINDOW_GROUPS,
    ):
        """Selects the documents and checks that the corpus is large enough.

        Args:
          lengths: tokens of each document, in the order of the corpus.
          budget: D.
          seq_len: L.
          repetitions: R, passes over the first ceil(D / R) tokens. If R does not divide D, the last pass ends
            up to R - 1 tokens early.
          seed: seed of the order of documents and sequences in each pass; None keeps the corpus order.
          unique: U, at most D, in place of ceil(D / R); 0: ceil(D / R). If U does not divide D, the last pass
            is incomplete.
          window_groups: maximum number of groups of documents per window.

        Raises:
          UserError: if the corpus has fewer than ceil(D / R) tokens, or the file of lengths is damaged.
          BucketError: if a bucket does not answer.
        """
        self.budget, self.unique = budget, unique or -(-budget // repetitions)
        self.num_sequences = -(-budget // seq_len)
        self._lengths, self._seq_len, self._seed = lengths, seq_len, seed
        if lengths.tokens < self.unique:
            too_few = f"the corpus has {lengths.tokens:,} training tokens, but "
            if lengths.tokens < seq_len:  # more repetitions would exceed the number of sequences
                raise UserError(
                    f"{too_few}a sequence has config.seq_len={seq_len:,}; lower config.seq_len to "
                    f"{lengths.tokens:,} or less, or prepare more text"
                )
            raise UserError(
                f"{too_few}the run needs {self.unique:,} unique tokens ({budget:,} tokens / {repetitions} "
                f"repetitions); raise config.repetitions to {-(-budget // lengths.tokens)} or more, lower "
                "config.steps, or prepare more text"
            )
        groups = int(np.searchsorted(lengths.token_ends_M, self.unique)) + 1
        before = int(lengths.token_ends_M[groups - 2]) if groups > 1 else 0
        end_G = before + np.cumsum(lengths.read([groups - 1]), dtype=np.int64)
        last = int(np.searchsorted(end_G, self.unique))
        self._documents = (groups - 1) * lengths.group_size + last + 1
        self._cut = int(end_G[last]) - self.unique  # tokens of the last document that are not in a pass
        self._group_tokens_M = np.diff(lengths.token_ends_M[:groups], prepend=0)
        self._group_tokens_M[-1] = self.unique - before
        self._windows = -(-groups // window_groups)  # per pass
        self._lock = threading.Lock()
        self._pass = functools.lru_cache(_CACHED)(self._make_pass)
        self._window = functools.lru_cache(_CACHED)(self._make_window)

    def segments(self, index_B: np.ndarray) -> Segments:
        """Returns the document segments of the given sequences. Thread-safe.

        Each sequence has L + 1 tokens, the last one of the stream fewer.

        Args:
          index_B: indices of sequences in the order in which the run visits them, in [0, num_sequences).

        Raises:
          UserError: if the file of lengths is damaged.
          BucketError: if a bucket does not answer.
        """
        with self._lock:
            start_B = self._stream_index(np.asarray(index_B, np.int64)) * self._seq_len
            stop_B = np.minimum(start_B + self._seq_len + 1, self.budget)
            row_P, window_P, start_P, stop_P = self._divide_at_windows(start_B, stop_B)
            segments = [
                self._within_window(window, row_P[selected], start_P[selected], stop_P[selected])
                for window, selected in _by_value(window_P)
            ]
        if len(segments) == 1:
            return segments[0]
        joined = Segments(*(np.concatenate(arrays) for arrays in zip(*segments, strict=True)))
        order_S = np.argsort(joined.row_S, kind="stable")  # segments of one sequence are already in order
        return Segments(*(array[order_S] for array in joined))

    def _stream_index(self, index_B: np.ndarray) -> np.ndarray:
        """Maps indices in visiting order to indices in the stream."""
        if self._seed is None:
            return index_B
        window_B, stream_B = self._window_at(index_B * self._seq_len), np.empty_like(index_B)
        for window, selected in _by_value(window_B):
            first, stop = (
                min(-(-token // self._seq_len), self.num_sequences) for token in self._window_range(window)
            )
            words = self._seed, _SEQUENCES, *divmod(window, self._windows)
            stream_B[selected] = first + permute(index_B[selected] - first, stop - first, *words)
        return stream_B

    def _window_at(self, token_P: np.ndarray) -> np.ndarray:
        """Returns the window of tokens of the stream; windows are counted over all passes."""
        repetition_P, offset_P = np.divmod(token_P, self.unique)
        window_P = repetition_P * self._windows
        if self._windows > 1:
            for repetition, selected in _by_value(repetition_P):
                token_W1 = self._pass(repetition).token_W1
                window_P[selected] += np.searchsorted(token_W1, offset_P[selected], side="right") - 1
        return window_P

    def _window_range(self, window: int) -> tuple[int, int]:
        """Returns the token range of a window in the stream."""
        repetition, number = divmod(window, self._windows)
        start, stop = self._pass(repetition).token_W1[number : number + 2].tolist()
        return repetition * self.unique + start, repetition * self.unique + stop

    def _divide_at_windows(self, start_B: np.ndarray, stop_B: np.ndarray) -> tuple[np.ndarray, ...]:
        """Divides ranges of the stream at the borders of windows; returns row, window, start and stop."""
        row_P, start_P, stop_P = np.arange(len(start_B)), start_B, stop_B
        parts = []
        while len(row_P):
            window_P, end_P = self._window_at(start_P), np.empty_like(start_P)
            for window, selected in _by_value(window_P):
                end_P[selected] = self._window_range(window)[1]
            parts.append((row_P, window_P, start_P, np.minimum(stop_P, end_P)))
            continues_P = stop_P > end_P
            row_P, start_P, stop_P = row_P[continues_P], end_P[continues_P], stop_P[continues_P]
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def _within_window(self, window: int, row_P, start_P, stop_P) -> Segments:
        """Returns the document segments of stream ranges [start, stop) within one window."""
        (document_N, end_N), first = self._window(window), self._window_range(window)[0]
        start_P, stop_P = start_P - first, stop_P - first
        first_P = np.searchsorted(end_N, start_P, side="right")
        last_P = np.searchsorted(end_N, stop_P, side="left")
        range_S, offset_S = _concatenated_ranges(last_P - first_P + 1)
        position_S = first_P[range_S] + offset_S
        document_start_S = np.where(position_S > 0, end_N[position_S - 1], 0)
        repetition, number = divmod(window, self._windows)
        before = repetition * self._documents + int(self._pass(repetition).document_W1[number])
        return Segments(
            row_S=row_P[range_S],
            document_S=document_N[position_S],
            start_S=np.maximum(start_P[range_S] - document_start_S, 0),
            stop_S=np.minimum(stop_P[range_S], end_N[position_S]) - document_start_S,
            instance_S=before + position_S,
        )

    def _make_pass(self, repetition: int) -> _Pass:
        groups = len(self._group_tokens_M)
        group_M = np.arange(groups)
        if self._seed is not None:
            group_M = permutation(groups, self._seed, _GROUPS, repetition)
        border_W1 = np.arange(self._windows + 1) * groups // self._windows
        first_M, size_M = self._lengths.documents_of(group_M)
        size_M = np.minimum(size_M, self._documents - first_M)
        token_W1, document_W1 = (
            np.concatenate([[0], np.cumsum(count_M)])[border_W1]
            for count_M in (self._group_tokens_M[group_M], size_M)
        )
        return _Pass(np.split(group_M, border_W1[1:-1]), token_W1, document_W1)

    def _make_window(self, window: int) -> _Window:
        repetition, number = divmod(window, self._windows)
        group_K = self._pass(repetition).groups[number]
        first_K, size_K = self._lengths.documents_of(group_K)
        group_N, offset_N = _concatenated_ranges(size_K)
        document_N, length_N = first_K[group_N] + offset_N, self._lengths.read(group_K)
        in_pass_N = document_N < self._documents
        document_N, length_N = document_N[in_pass_N], length_N[in_pass_N]
        length_N = np.where(document_N == self._documents - 1, length_N - self._cut, length_N)
        if self._seed is not None:
            order_N = permutation(len(document_N), self._seed, _DOCUMENTS, repetition, number)
            document_N, length_N = document_N[order_N], length_N[order_N]
        return _Window(document_N, np.cumsum(length_N, dtype=np.int64))


def _by_value(values_P: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray]]:
    """Yields each distinct value, in increasing order, and the positions that have it."""
    first = int(values_P[0])
    if (values_P == first).all():  # saves the time of sorting
        yield first, slice(None)
        return
    for value in np.unique(values_P).tolist():
        yield value, values_P == value


def _concatenated_ranges(size_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenates `range(size)` for all sizes; returns the index of the range and the value, per element."""
    range_S = np.repeat(np.arange(len(size_P)), size_P)
    return range_S, np.arange(len(range_S)) - np.repeat(np.cumsum(size_P) - size_P, size_P)
