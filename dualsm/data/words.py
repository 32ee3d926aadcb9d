"""Normalized words of a text, and hashes of its n-grams.

Words are separated by whitespace, in lower case and without punctuation and symbols. In scripts that do not
separate words, such as Han, Kana and Thai, every character is a word.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata

import numpy as np

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication modulo 2^64 is invertible


# First and last character of the Unicode blocks of scripts that do not separate words.
_UNSEPARATED = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # halfwidth Katakana
    (0x20000, 0x3FFFF),
)


class _Normalization(dict):
    """A table for `str.translate` that deletes punctuation and symbols, and separates words."""

    def __missing__(self, code: int) -> int | str | None:
        self[code] = code
        if unicodedata.category(chr(code))[0] in "PS":
            self[code] = None
        elif any(first <= code <= last for first, last in _UNSEPARATED):
            self[code] = f" {chr(code)} "
        return self[code]


_NORMALIZATION = _Normalization()


def words_of(text: str) -> list[str]:
    """Returns the normalized words of a text."""
    return text.lower().translate(_NORMALIZATION).split()


@functools.lru_cache(maxsize=1 << 16)
def _hash_of(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")


def hash_words(text: str) -> np.ndarray:
    """Returns the hashes of the normalized words of a text, uint64."""
    words = words_of(text)
    return np.fromiter(map(_hash_of, words), np.uint64, len(words))


def ngram_hashes(words_W: np.ndarray, n: int) -> np.ndarray:
    """Returns the hashes of all n-grams in order, uint64, given the hashes of the words.

    The hash of an n-gram is a polynomial in the hashes of its words, modulo 2^64.
    """
    count = max(0, len(words_W) - n + 1)
    hashes_N = np.zeros(count, np.uint64)
    for offset in range(n):
        hashes_N = hashes_N * _MULTIPLIER + words_W[offset : offset + count]
    return hashes_N
