"""Finds documents that share n-grams of words with the texts of evaluation tasks."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dualsm.data.words import hash_words, ngram_hashes

MIN_WORDS = 8  # shorter texts occur by chance; also the minimum of GPT-3


@dataclasses.dataclass(frozen=True)
class TaskNgrams:
    """Hashes of the n-grams of task texts.

    A text with fewer than n words contributes all of its words as one n-gram. A text with fewer than
    `MIN_WORDS` and fewer than n words is skipped. Two n-grams with the same 64-bit hash count as equal.

    Attributes:
      files: names of the task files.
      tables: number of words -> (hashes of the n-grams, sorted, uint64; index of the file of each, int32). An
        n-gram of several files has one entry per file.
      skipped: number of texts that are too short; 0 after `load_ngrams`.

    The rule, an overlap of 13 words, or of at least 8 for short texts, follows GPT-3 (Brown et al. 2020,
    arXiv 2005.14165, appendix C).
    """

    files: tuple[str, ...]
    tables: dict[int, tuple[np.ndarray, np.ndarray]]
    skipped: int = 0

    @classmethod
    def of(cls, texts: Mapping[str, Sequence[str]], n: int) -> TaskNgrams:
        """Returns the n-grams of task texts, given by file."""
        entries = collections.defaultdict(list)
        skipped = 0
        for index, of_file in enumerate(texts.values()):
            for text in of_file:
                words_W = hash_words(text)
                if len(words_W) < min(n, MIN_WORDS):
                    skipped += 1
                    continue
                size = min(n, len(words_W))
                hashes_N = ngram_hashes(words_W, size)
                pair = np.empty(len(hashes_N), [("hash", "<u8"), ("file", "<i4")])
                pair["hash"], pair["file"] = hashes_N, index
                entries[size].append(pair)
        tables = {}
        for size in sorted(entries):
            unique = np.unique(np.concatenate(entries[size]))  # sorted by hash, then by file
            tables[size] = (unique["hash"].copy(), unique["file"].copy())
        return cls(tuple(texts), tables, skipped)

    def matches(self, text: str) -> list[int]:
        """Returns the indices of the files that share an n-gram with a text, sorted."""
        found: set[int] = set()
        words_W = hash_words(text)
        for size, (hashes_N, file_N) in self.tables.items():
            grams = ngram_hashes(words_W, size)
            first = np.searchsorted(hashes_N, grams)
            hits = hashes_N[np.minimum(first, len(hashes_N) - 1)] == grams
            for gram in np.unique(grams[hits]):
                low, high = np.searchsorted(hashes_N, gram), np.searchsorted(hashes_N, gram, "right")
                found.update(file_N[low:high].tolist())
        return sorted(found)

    def sha256(self) -> str:
        """Returns a hash of the n-grams, without the names and the order of the files."""
        digest = hashlib.sha256()
        for size, (hashes_N, _) in self.tables.items():
            digest.update(f"{size}:".encode() + np.unique(hashes_N).astype("<u8").tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the n-grams to a file for `load_ngrams`."""
        arrays = {}
        for size, (hashes_N, file_N) in self.tables.items():
            arrays |= {f"hashes-{size}": hashes_N, f"files-{size}": file_N}
        with open(path, "wb") as file:
            np.savez(file, names=np.array(self.files), **arrays)


@functools.lru_cache(maxsize=1)
def load_ngrams(path: Path, sha256: str) -> TaskNgrams:
    """Loads n-grams, once per process; `sha256` distinguishes files that have the same path in turn."""
    with np.load(path) as arrays:
        sizes = [int(name.removeprefix("hashes-")) for name in arrays if name.startswith("hashes-")]
        tables = {size: (arrays[f"hashes-{size}"], arrays[f"files-{size}"]) for size in sizes}
        ngrams = TaskNgrams(tuple(arrays["names"].tolist()), tables)
    if ngrams.sha256() != sha256:
        raise ValueError(f"{path} has changed")
    return ngrams
