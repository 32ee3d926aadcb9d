"""Training batches: the sequences of step s are a function of (config, s), on any number of processes.

    SequenceOrder (token ranges) + Documents (tokens) -> BatchSource -> Grain (worker threads, prefetch)

The step is the only iterator state, so resuming at step 1,000,000 costs as much as starting at step 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from dualsm.data.documents import Documents
from dualsm.data.sequence_order import SequenceOrder

PAD_DOCUMENT = -1  # document index of padding positions


def read_sequences(
    documents: Documents, order: SequenceOrder, index_B: np.ndarray, seq_len: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads packed sequences of L + 1 tokens: L inputs and, shifted by one, their targets.

    Args:
      documents: a split of a corpus.
      order: the order of the split's sequences.
      index_B: indices of the sequences in `order`.
      seq_len: L.
      pad: token id for positions after the end of the stream.

    Returns:
      tokens_BxL1 and documents_BxL1, int32 of shape [B, L+1]. Document indices start at 0 in each sequence
      and are `PAD_DOCUMENT` for padding.
    """
    segments = order.segments(index_B)
    tokens_S = documents.read(segments.document_S, segments.start_S, segments.stop_S)
    size_S = segments.stop_S - segments.start_S
    first_S = np.searchsorted(segments.row_S, segments.row_S)  # the first segment of the same sequence
    local_S = segments.instance_S - segments.instance_S[first_S]

    size_B = np.bincount(segments.row_S, weights=size_S, minlength=len(index_B)).astype(np.int64)
    filled_BxL1 = np.arange(seq_len + 1) < size_B[:, None]
    tokens_BxL1 = np.full(filled_BxL1.shape, pad, np.int32)
    documents_BxL1 = np.full(filled_BxL1.shape, PAD_DOCUMENT, np.int32)
    tokens_BxL1[filled_BxL1] = np.concatenate(tokens_S)
    documents_BxL1[filled_BxL1] = np.repeat(local_S, size_S)
    return tokens_BxL1, documents_BxL1


class OrderedDocuments(NamedTuple):
    """The training split of a corpus, and the order of its sequences in a run."""

    documents: Documents
    order: SequenceOrder


@dataclasses.dataclass(frozen=True)
class BatchSource:
    """A random-access Grain source: element s is this process's part of the batch of step s.

    Attributes:
      corpora: the corpora that the run reads; several if it has several sources.
      batch_size: B, sequences per step over all processes.
      seq_len: L.
      pad: id of `<pad>`, which fills the one position after the end of each corpus's sequences.
      local_rows: rows of the batch that this process reads, in [0, B).
      steps: number of steps; 0: the number of complete batches.
      row_sources: step -> index of the corpus of each row of the batch, and index of the row's sequence in
        the order of that corpus, int64 [B] each; None: step s reads the sequences s * B to s * B + B - 1 of
        the first corpus.
    """

    corpora: Sequence[OrderedDocuments]
    batch_size: int
    seq_len: int
    pad: int
    local_rows: Sequence[int] | np.ndarray
    steps: int = 0
    row_sources: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None

    def __len__(self) -> int:
        return self.steps or self.corpora[0].order.num_sequences // self.batch_size

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        row_B = np.asarray(self.local_rows)
        if self.row_sources:
            corpus_B, index_B = (array_B[row_B] for array_B in self.row_sources(step))
        else:
            corpus_B, index_B = np.zeros_like(row_B), step * self.batch_size + row_B
        tokens_BxL1, documents_BxL1 = (np.empty((len(row_B), self.seq_len + 1), np.int32) for _ in range(2))
        for corpus in np.unique(corpus_B).tolist():
            mine_B = corpus_B == corpus
            tokens_BxL1[mine_B], documents_BxL1[mine_B] = read_sequences(
                *self.corpora[corpus], index_B[mine_B], self.seq_len, self.pad
            )
        return {"step": step, "tokens": tokens_BxL1, "documents": documents_BxL1}


def read_batches(
    source: BatchSource,
    first_step: int,
    num_threads: int,
    prefetch_steps: int,
    transform: Callable[[dict], Any] = lambda element: element,
) -> Iterator:
    """Iterates over the batches of `source` from `first_step` on, prefetching in worker threads.

    Args:
      source: the batches.
      first_step: step of the first batch.
      num_threads: number of worker threads.
      prefetch_steps: number of steps to prefetch; raised to `num_threads` if it is lower, because Grain would
        leave threads idle.
      transform: applied to each element in the thread that read it.
    """
    dataset = grain.MapDataset.source(source)[first_step:].map(transform)
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(prefetch_steps, num_threads)
    )
    return iter(dataset.to_iter_dataset(options))
