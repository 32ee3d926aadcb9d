"""Batches by step: the rows of step s follow from (config, s) alone, on any number of processes.

    RepeatedStream (which tokens) + Documents (the tokens) -> StepRows -> Grain (threads, read-ahead)

There is no iterator state beyond the step, so resuming at step 1,000,000 costs what step 0 costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np

from dualsm.data.corpus import Documents
from dualsm.data.order import RepeatedStream

PAD_DOCUMENT = -1  # document id of positions that hold no text


def pack(pieces: list[np.ndarray], owners: np.ndarray, rows: int, row_tokens: int, pad: int):
    """Packs pieces of documents into rows, each token an input once.

    Row r holds tokens [r*L, r*L + L] of the pieces' concatenation: L inputs and, shifted by one, their
    targets, so that neighbouring rows share one token.

    Args:
      pieces: tokens, P arrays.
      owners: document id of each piece, [P].
      rows: number of rows, B.
      row_tokens: inputs a row, L.
      pad: token for the positions after the end.

    Returns:
      tokens_BxL1 and documents_BxL1, int32 of shape [B, L+1]. Documents count from 0 in each row, and are
      `PAD_DOCUMENT` after the end.
    """
    size = rows * row_tokens + 1
    tokens_T = np.full(size, pad, np.int32)
    documents_T = np.full(size, PAD_DOCUMENT, np.int32)
    flat_T = np.concatenate(pieces)[:size] if pieces else tokens_T[:0]
    tokens_T[: len(flat_T)] = flat_T
    documents_T[: len(flat_T)] = np.repeat(owners, [len(piece) for piece in pieces])[: len(flat_T)]
    tokens_BxL1, documents_BxL1 = (
        np.lib.stride_tricks.sliding_window_view(a_T, row_tokens + 1)[::row_tokens]
        for a_T in (tokens_T, documents_T)
    )
    local_BxL1 = np.where(documents_BxL1 >= 0, documents_BxL1 - documents_BxL1[:, :1], PAD_DOCUMENT)
    return np.ascontiguousarray(tokens_BxL1), local_BxL1


@dataclasses.dataclass(frozen=True)
class StepRows:
    """A random-access Grain source whose element s is this process's rows of step s.

    Attributes:
      documents: the training split.
      stream: the order of its tokens.
      steps: length of the run.
      batch_rows: B, rows a step over all processes.
      row_tokens: L.
      pad: id of `<pad>`, which fills the one position after the end of the run.
      rows: the part of the batch this process reads, as a range within [0, B).
    """

    documents: Documents
    stream: RepeatedStream
    steps: int
    batch_rows: int
    row_tokens: int
    pad: int
    rows: range

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        start = (step * self.batch_rows + self.rows.start) * self.row_tokens
        stop = min(start + len(self.rows) * self.row_tokens + 1, self.stream.budget)
        segments = self.stream.segments(start, stop)
        tokens = self.documents.read(segments.document_S)
        pieces = [t[a:b] for t, a, b in zip(tokens, segments.start_S, segments.stop_S, strict=True)]
        owners = segments.occurrence_S - segments.occurrence_S[0]
        tokens_BxL1, documents_BxL1 = pack(pieces, owners, len(self.rows), self.row_tokens, self.pad)
        return {"step": step, "tokens": tokens_BxL1, "documents": documents_BxL1}


def read_steps(source: StepRows, first: int, threads: int, ahead: int) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over steps `first`, `first + 1`, ... of `source`, reading ahead in threads."""
    dataset = grain.MapDataset.source(source)[first:]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(dataset.to_iter_dataset(options))
