"""The first record of each document of a split."""

from __future__ import annotations

import threading

import numpy as np

from dualsm.data.document_lengths import DocumentLengths, record_count

_MAX_GROUPS = 256  # in memory, 64 KiB each; a pass reads from 64 to 128 groups at a time


class RecordIndex:
    """Finds the first record of documents. Keeps the offsets of a bounded number of groups. Thread-safe."""

    def __init__(self, lengths: DocumentLengths, max_groups: int = _MAX_GROUPS):
        """
        Args:
          lengths: lengths of the documents.
          max_groups: number of groups of documents whose offsets are kept in memory.
        """
        groups = len(lengths.record_ends_M)
        self._lengths, self._lock = lengths, threading.Lock()
        self._start_M = np.concatenate([[0], lengths.record_ends_M[:-1]])
        self._slot_M = np.full(groups, -1, np.int32)
        slots = min(max_groups, groups)
        self._offset_CxG = np.empty((slots, min(lengths.group_size, len(lengths))), np.int32)
        self._used = 0

    def first(self, document_S: np.ndarray) -> np.ndarray:
        """Returns the index of the first record of each document, int64.

        Raises:
          UserError: if the file of lengths is damaged.
          BucketError: if a bucket does not answer.
        """
        group_S, place_S = np.divmod(document_S, self._lengths.group_size)
        with self._lock:
            if self._load(group_S):
                return self._start_M[group_S] + self._offset_CxG[self._slot_M[group_S], place_S]
        half = len(document_S) // 2  # more groups than slots
        return np.concatenate([self.first(document_S[:half]), self.first(document_S[half:])])

    def _load(self, group_S: np.ndarray) -> bool:
        """Loads the offsets of groups; returns False if they are more than the slots."""
        if (self._slot_M[group_S] >= 0).all():
            return True
        needed_K = np.unique(group_S)
        slots = len(self._offset_CxG)
        if len(needed_K) > slots:
            return False
        missing_K = needed_K[self._slot_M[needed_K] < 0]
        if self._used + len(missing_K) > slots:
            self._slot_M[:], self._used, missing_K = -1, 0, needed_K
        records_N = record_count(self._lengths.read(missing_K))
        _, size_K = self._lengths.documents_of(missing_K)
        for group, records_G in zip(missing_K, np.split(records_N, np.cumsum(size_K)[:-1]), strict=True):
            self._offset_CxG[self._used, : len(records_G)] = np.cumsum(records_G) - records_G
            self._slot_M[group] = self._used
            self._used += 1
        return True
