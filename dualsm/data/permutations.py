"""Seeded permutations that are the same on every machine and in every version of NumPy."""

from __future__ import annotations

import functools
import math

import numpy as np

_ROUNDS = 6
_MAX_TABLE = 1 << 16  # indices of a permutation that is kept in memory


def permutation(size: int, *words: int) -> np.ndarray:
    """Returns a random permutation of 0..size-1, int64; sorts the indices by a bijective hash.

    Args:
      size: number of indices.
      words: the seed and further integers; other words give an independent permutation.
    """
    return np.argsort(_splitmix64(np.arange(size, dtype=np.uint64) ^ _key(words)))


def permute(index_B: np.ndarray, size: int, *words: int) -> np.ndarray:
    """Returns the images of indices under a random permutation of 0..size-1, in bounded memory.

    Small permutations are tables. Large ones are a Feistel network over the rows and columns of a grid of at
    least `size` cells. An image outside of 0..size-1 is mapped again (cycle walking); that is about one image
    of sqrt(size).

    Args:
      index_B: indices in [0, size).
      size: number of indices that the permutation maps.
      words: the seed and further integers, as in `permutation`.

    Returns:
      int64 [B].

    Black and Rogaway, "Ciphers with arbitrary finite domains" (2002).
    """
    if size <= _MAX_TABLE:
        return _table(size, words)[index_B]
    columns = np.uint64(math.isqrt(max(size - 1, 0)) + 1)
    rows = np.uint64(-(-size // int(columns)))
    keys = _round_keys(words)

    def encrypt(index_B: np.ndarray) -> np.ndarray:
        row_B, column_B = np.divmod(index_B, columns)
        for row_key, column_key in zip(keys[::2], keys[1::2], strict=True):
            # Halves of hashes, so that the sum does not overflow.
            row_B = (row_B + (_splitmix64(column_B ^ row_key) >> np.uint64(1))) % rows
            column_B = (column_B + (_splitmix64(row_B ^ column_key) >> np.uint64(1))) % columns
        return row_B * columns + column_B

    image_B = encrypt(np.asarray(index_B).astype(np.uint64))
    while (outside_B := image_B >= size).any():
        image_B[outside_B] = encrypt(image_B[outside_B])
    return image_B.astype(np.int64)


@functools.lru_cache(maxsize=8)
def _table(size: int, words: tuple[int, ...]) -> np.ndarray:
    return permutation(size, *words)


@functools.lru_cache(maxsize=64)
def _round_keys(words: tuple[int, ...]) -> list[np.uint64]:
    return [_key((*words, number))[0] for number in range(_ROUNDS)]


def _key(words: tuple[int, ...]) -> np.ndarray:
    """Returns a hash of the words, uint64 [1]."""
    key = np.zeros(1, np.uint64)
    for word in words:
        key = _splitmix64(key ^ _splitmix64(np.array([word % 2**64], np.uint64)))
    return key


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Applies the finalizer of SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64-bit words."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
