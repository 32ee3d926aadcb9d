"""Held-out documents packed into rows, and their sizes in bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dualsm.data.batches import PAD_DOCUMENT, read_sequences
from dualsm.data.documents import Documents
from dualsm.data.sequence_order import SequenceOrder
from dualsm.objectives.example import SpecialIds
from dualsm.training.run_corpora import RunCorpus

INEXACT_BYTES = (
    "the corpus does not store the sizes of its documents, so bits per byte use the bytes of the tokens; "
    "prepare the corpus again in another folder for exact values"
)
_DOCUMENTS_PER_READ = 1024


class ValidRows(NamedTuple):
    """Held-out documents packed into rows, and their sizes in bytes.

    Attributes:
      tokens_VxL1: int32; token ids.
      documents_VxL1: int32; index of each token's document within the row, `PAD_DOCUMENT` for padding.
      scale_VxL1: float32; factor on `token_bytes_V`. With this factor the bytes of a document's tokens sum to
        the bytes of its text. A document that is split between two rows has the same factor in both.
      first_document_V: int64; index in the corpus of the first document of each row. The documents of a row
        are consecutive.
      token_bytes_V: float32; bytes of text per token.
      exact: False if the corpus does not store the sizes of its documents; all factors are then 1.
    """

    tokens_VxL1: np.ndarray
    documents_VxL1: np.ndarray
    scale_VxL1: np.ndarray
    first_document_V: np.ndarray
    token_bytes_V: np.ndarray
    exact: bool


def valid_rows(
    documents: Documents, seq_len: int, rows: int, special: SpecialIds, token_bytes_V: np.ndarray
) -> ValidRows:
    """Packs the held-out documents into rows, in corpus order.

    Args:
      documents: the held-out split.
      seq_len: L.
      rows: maximum number of rows; 0: all.
      special: special ids; `pad` fills the last row.
      token_bytes_V: from `Tokenizer.token_bytes`.
    """
    order = SequenceOrder(documents.lengths, documents.tokens, seq_len)
    row_V = np.arange(min(order.num_sequences, rows) if rows else order.num_sequences)
    tokens_VxL1, documents_VxL1 = read_sequences(documents, order, row_V, seq_len, special.pad)
    scale_VxL1 = np.ones(tokens_VxL1.shape, np.float32)
    segments = order.segments(row_V)
    if documents.bytes_N is not None:
        count = int(segments.document_S.max()) + 1  # documents are in corpus order
        token_bytes_V, scale_N = _fit_to_documents(documents, count, special.unk, token_bytes_V)
        scale_S = scale_N[segments.document_S]
        scale_VxL1[documents_VxL1 != PAD_DOCUMENT] = np.repeat(scale_S, segments.stop_S - segments.start_S)
    return ValidRows(
        tokens_VxL1,
        documents_VxL1,
        scale_VxL1,
        segments.document_S[np.searchsorted(segments.row_S, row_V)],
        token_bytes_V.astype(np.float32),
        documents.bytes_N is not None,
    )


def rows_by_source(corpora: Sequence[RunCorpus], seq_len: int, rows: int) -> dict[str, ValidRows]:
    """Returns the held-out rows of each source by its name; see `valid_rows`."""
    found = {}
    for source, corpus in corpora:
        tokenizer = corpus.tokenizer()
        found[source.name] = valid_rows(
            corpus.documents("valid"), seq_len, rows, tokenizer.special, tokenizer.token_bytes()
        )
    return found


def _fit_to_documents(
    documents: Documents, count: int, unk: int, token_bytes_V: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fits the bytes per token to the sizes of the first `count` documents.

    Documents are read completely, including the one that the last row cuts off. The bytes that the other
    tokens do not account for are divided equally among the `<unk>` tokens, so that objectives that never
    score `<unk>` are not credited with its bytes.

    Returns:
      `token_bytes_V` with a value for `<unk>`, and the factor `scale_N` of each document.
    """
    known_N, unknown_N = np.zeros(count), np.zeros(count)
    for first in range(0, count, _DOCUMENTS_PER_READ):
        indices = range(first, min(first + _DOCUMENTS_PER_READ, count))
        for index, tokens in zip(indices, documents.read(indices), strict=True):
            known_N[index] = token_bytes_V[tokens].sum()
            unknown_N[index] = (tokens == unk).sum()
    bytes_N = documents.bytes_N[:count]
    left = (bytes_N - known_N)[unknown_N > 0].sum()
    token_bytes_V = token_bytes_V.astype(np.float64)
    token_bytes_V[unk] = max(left, 0) / max(unknown_N.sum(), 1)
    sum_N = known_N + unknown_N * token_bytes_V[unk]
    return token_bytes_V, np.divide(bytes_N, sum_N, out=np.ones(count), where=sum_N > 0)


def valid_batches(rows: ValidRows, size: int, pad: int, samples: int = 1) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields batches of `size` rows; pads the last batch with empty rows.

    Each of n batches takes every n-th row, so that it is a sample of the whole split.

    Args:
      rows: from `valid_rows`.
      size: B, rows per batch.
      pad: id of `<pad>`.
      samples: number of times that each row is in the batches.

    Yields:
      tokens_BxL1, documents_BxL1, scale_BxL1, and `Row.stratum` and `Row.strata` of each row, int32 [B]: the
      amounts of corruption are spread over the split.
    """
    arrays = [np.tile(a, (samples, 1)) for a in rows[:3]]
    missing = -len(arrays[0]) % size
    fill = (pad, PAD_DOCUMENT, 1)
    arrays = [
        np.pad(a, [(0, missing), (0, 0)], constant_values=value)
        for a, value in zip(arrays, fill, strict=True)
    ]
    index_V, batches = np.arange(len(arrays[0]), dtype=np.int32), len(arrays[0]) // size
    strata_B = np.full(size, samples * len(rows.tokens_VxL1), np.int32)
    for first in range(batches):
        part = slice(first, None, batches)
        yield *(a[part] for a in arrays), index_V[part], strata_B
