"""Batches of prompts: one PRNG key per prompt, few shapes, bounded memory."""

from __future__ import annotations

import collections
import zlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dualsm.model.attention import QUERIES

TOKENS_AT_ONCE = 16384  # tokens of all texts of a batch, those still to be generated included
_MULTIPLE = 32  # of which the length of a batch of short texts is a multiple


def prompt_keys(seed: int, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """PRNG key of each prompt, [B], so that a prompt's text depends on no other prompt.

    A key follows from the seed, the prompt's tokens, and the number of equal prompts before it: equal prompts
    get different texts.

    Args:
      seed: of all keys.
      prompts: token ids.
    """
    seen: collections.Counter[bytes] = collections.Counter()
    data_Bx2 = np.zeros((len(prompts), 2), np.uint32)
    for row, prompt in enumerate(prompts):
        content = np.asarray(prompt, np.int32).tobytes()
        data_Bx2[row] = zlib.crc32(content), seen[content]
        seen[content] += 1
    key = jax.random.key(seed)
    return jax.vmap(lambda data: jax.random.fold_in(jax.random.fold_in(key, data[0]), data[1]))(data_Bx2)


def texts_at_once(longest: int) -> int:
    """Number of texts of at most `longest` tokens that are generated together."""
    return max(1, TOKENS_AT_ONCE // longest)


def split(texts: int, longest: int) -> Iterator[slice]:
    """Divides `texts` texts of at most `longest` tokens into batches."""
    size = texts_at_once(longest)
    return (slice(start, start + size) for start in range(0, texts, size))


def pad(texts: Sequence[Sequence[int]], padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of texts, padded at the right, int32 [B, L], and the length of each, int32 [B].

    L takes few values, so that other texts rarely compile again. Above 2 `QUERIES` it is a multiple of
    `QUERIES`, for which attention holds no [L, L] array.
    """
    length_B = np.array([len(text) for text in texts], np.int32)
    longest = int(length_B.max())
    multiple = QUERIES if longest > 2 * QUERIES else _MULTIPLE
    tokens_BxL = np.full((len(texts), -(-longest // multiple) * multiple), padding, np.int32)
    for row, text in zip(tokens_BxL, texts, strict=True):
        row[: len(text)] = text
    return tokens_BxL, length_B
