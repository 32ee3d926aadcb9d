"""Batches by step: the rows of step s follow from (config, s) alone, on any number of processes.

    RowOrder (where the tokens are) + Documents (the tokens) -> StepRows -> Grain (threads, read-ahead)

There is no iterator state beyond the step, so resuming at step 1,000,000 costs what step 0 costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from dualsm.data.corpus import Documents
from dualsm.data.order import RowOrder

PAD_DOCUMENT = -1  # document id of positions that hold no text


def read_rows(
    documents: Documents, order: RowOrder, row_B: np.ndarray, seq_len: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of packed documents: L inputs and, shifted by one, their targets.

    Args:
      documents: a split of a corpus.
      order: of its rows.
      row_B: numbers of the rows wanted.
      seq_len: L.
      pad: token for positions after the end of the stream.

    Returns:
      tokens_BxL1 and documents_BxL1, int32 of shape [B, L+1]. Documents count from 0 in each row, and are
      `PAD_DOCUMENT` after the end.
    """
    segments = order.segments(row_B)
    pieces = documents.read(segments.document_S, segments.start_S, segments.stop_S)
    size_S = segments.stop_S - segments.start_S
    first_S = np.searchsorted(segments.row_S, segments.row_S)  # the first piece of the same row
    local_S = segments.occurrence_S - segments.occurrence_S[first_S]

    size_B = np.bincount(segments.row_S, weights=size_S, minlength=len(row_B)).astype(np.int64)
    filled_BxL1 = np.arange(seq_len + 1) < size_B[:, None]
    tokens_BxL1 = np.full(filled_BxL1.shape, pad, np.int32)
    documents_BxL1 = np.full(filled_BxL1.shape, PAD_DOCUMENT, np.int32)
    tokens_BxL1[filled_BxL1] = np.concatenate(pieces)
    documents_BxL1[filled_BxL1] = np.repeat(local_S, size_S)
    return tokens_BxL1, documents_BxL1


@dataclasses.dataclass(frozen=True)
class StepRows:
    """A random-access Grain source whose element s is this process's rows of step s.

    Attributes:
      documents: the training split.
      order: the order of its rows.
      batch_size: B, rows a step over all processes.
      seq_len: L.
      pad: id of `<pad>`, which fills the one position after the end of the run.
      part: the rows of a batch that this process reads, numbers in [0, B).
    """

    documents: Documents
    order: RowOrder
    batch_size: int
    seq_len: int
    pad: int
    part: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return self.order.rows // self.batch_size

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        row_B = step * self.batch_size + np.asarray(self.part)
        tokens_BxL1, documents_BxL1 = read_rows(self.documents, self.order, row_B, self.seq_len, self.pad)
        return {"step": step, "tokens": tokens_BxL1, "documents": documents_BxL1}


def read_steps(
    source: StepRows, first: int, threads: int, ahead: int, finish: Callable[[dict], Any] = lambda step: step
) -> Iterator:
    """Iterates over steps `first`, `first + 1`, ... of `source`, prefetching in threads.

    Args:
      source: of the steps.
      first: step to start at.
      threads: number of threads that read.
      ahead: steps to prefetch; at least one per thread, because Grain keeps other threads idle.
      finish: applied to each step in the thread that read it.
    """
    dataset = grain.MapDataset.source(source)[first:].map(finish)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    return iter(dataset.to_iter_dataset(options))
