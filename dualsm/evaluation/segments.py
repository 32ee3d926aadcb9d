"""Segments of held-out documents, spread evenly over the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dualsm.data.documents import Documents


class Segment(NamedTuple):
    """Consecutive tokens of a held-out document.

    Attributes:
      source: index of its source.
      document: index of its document in the source.
      tokens: token ids.
    """

    source: int
    document: int
    tokens: np.ndarray


def read_segments(sources: Sequence[Documents], seq_len: int, count: int) -> list[Segment]:
    """Returns up to `count` segments of at most `seq_len` tokens, spread evenly over the documents.

    Documents are divided into segments of `seq_len` tokens; a last segment of a single token is left out.

    Args:
      sources: the held-out split of each corpus.
      seq_len: L.
      count: number of segments; all segments if there are fewer.
    """
    counts = [(documents.lengths_N + seq_len - 2) // seq_len for documents in sources]
    total, first, segments = sum(int(count_N.sum()) for count_N in counts), 0, []
    index_S = np.arange(min(count, total)) * total // min(count, total)
    for source, (documents, count_N) in enumerate(zip(sources, counts, strict=True)):
        end_N = first + np.cumsum(count_N)
        own_S = index_S[(index_S >= first) & (index_S < end_N[-1])]
        first = int(end_N[-1])
        document_S = np.searchsorted(end_N, own_S, side="right")
        start_S = (own_S - (end_N - count_N)[document_S]) * seq_len
        stop_S = np.minimum(start_S + seq_len, documents.lengths_N[document_S])
        read = documents.read(document_S, start_S, stop_S)
        segments += [Segment(source, int(d), tokens) for d, tokens in zip(document_S, read, strict=True)]
    return segments
