"""Words of held-out text whose borders are borders of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dualsm.data.documents import Documents
from dualsm.data.tokenizer import RESERVED_IDS, Tokenizer
from dualsm.evaluation.segments import read_segments

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_INSIDE = ("'", "’", "-")  # at an end of a segment, the word may continue after these
_SEED = 20251214  # the same words for every checkpoint


class HeldOutWord(NamedTuple):
    """A word in a segment of a held-out document.

    Attributes:
      document: index of its source, and of its document in the source.
      tokens_L: token ids of the segment.
      start, stop: token range of the word, and of the space before it if a token contains both.
      bytes: bytes of the word, without the space.
    """

    document: tuple[int, int]
    tokens_L: np.ndarray
    start: int
    stop: int
    bytes: int


def draw_words(
    sources: Sequence[Documents], tokenizer: Tokenizer, seq_len: int, count: int
) -> list[HeldOutWord]:
    """Returns up to `count` words, drawn with a fixed seed from segments that are spread over the text.

    The words are from different segments if there are enough.

    Args:
      sources: the held-out split of each corpus.
      tokenizer: the tokenizer of all sources.
      seq_len: L, the maximum number of tokens of a segment.
      count: number of words.
    """
    rng, token_bytes_V = np.random.default_rng(_SEED), tokenizer.token_bytes()
    by_segment = []
    for segment in read_segments(sources, seq_len, count):
        found = list(find_words(segment.tokens, tokenizer, token_bytes_V))
        document = segment.source, segment.document
        shuffled = [found[i] for i in rng.permutation(len(found))]
        by_segment.append([HeldOutWord(document, segment.tokens, *word) for word in shuffled])
    most = max(map(len, by_segment), default=0)
    return [words[i] for i in range(most) for words in by_segment if i < len(words)][:count]


def find_words(
    tokens_L: np.ndarray, tokenizer: Tokenizer, token_bytes_V: np.ndarray
) -> Iterator[tuple[int, int, int]]:
    """Yields the token range and the bytes of each word that consists of whole tokens.

    A word is a maximal sequence of letters, with apostrophes and hyphens inside. Its first token may begin
    with a space. Left out are words that share a token with other text, words that the segment may cut, and
    all words if the tokenizer does not reproduce the text.

    Args:
      tokens_L: segment of a document.
      tokenizer: its tokenizer.
      token_bytes_V: from `tokenizer.token_bytes`.
    """
    # At its ends, the segment may contain tokens for a part of a character.
    is_whole_L = np.array(["\ufffd" not in tokenizer.decode([token], inside=True) for token in tokens_L])
    if not is_whole_L.any():
        return
    first, last = np.flatnonzero(is_whole_L)[[0, -1]]
    whole_T = tokens_L[first : last + 1]
    text, end_T = tokenizer.decode(whole_T, inside=True), np.cumsum(token_bytes_V[whole_T])
    content = text.encode("utf-8")
    if end_T[-1] != len(content):
        return
    for match in _WORD.finditer(text):
        start = len(text[: match.start()].encode("utf-8"))
        size = len(match[0].encode("utf-8"))
        # A token of size 0, such as `<s>`, ends where the next one starts.
        i = int(np.searchsorted(end_T, start, side="right"))
        j = int(np.searchsorted(end_T, start + size, side="left"))
        may_be_cut = text[: match.start()] in _INSIDE or text[match.end() :] in _INSIDE
        is_inside = i > 0 and j + 1 < len(whole_T) and not may_be_cut
        if not is_inside or content[end_T[i - 1] : start].strip() or end_T[j] != start + size:
            continue
        if (whole_T[i : j + 1] >= RESERVED_IDS).all():
            yield int(first) + i, int(first) + j + 1, size
