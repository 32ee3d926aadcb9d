"""Removes near duplicates: documents that share most of their n-grams of words with another document.

MinHash signatures with locality-sensitive hashing (LSH, by `datasketch`) select candidates; their Jaccard
similarity is computed exactly. The signatures are computed in worker processes and stored on disk; the index
of the kept documents is in the memory of the main process.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dualsm.data.bucket_files import HASH_BYTES, Location, drop_documents, read_records, read_text
from dualsm.data.recipe import Recipe
from dualsm.data.words import hash_words, ngram_hashes
from dualsm.data.workers import map_in_order
from dualsm.process.errors import UserError
from dualsm.process.progress import bar

REPORT = "near_duplicates.jsonl"
_PERMUTATIONS = 128
_BATCH_SHINGLES = 1 << 14  # hashed at a time, which takes about 16 MB
_WEIGHTS = (
    0.05,
    0.95,
)  # of false positives, which are verified, and of false negatives, in the choice of bands
_MAX_LSH_THRESHOLD = 0.95  # higher ones leave too few bands; candidates are verified
_EXCERPT = 200  # characters in the report


class Document(NamedTuple):
    """A document of the report, and where its text is."""

    digest: bytes
    held_out: bool
    location: Location


def check_installed() -> None:
    """Raises `UserError` if datasketch is not installed."""
    if importlib.util.find_spec("datasketch") is None:
        raise UserError("--deduplicate=near: datasketch is not installed; run pip install 'dualsm[dedup]'")


def shingles(text: bytes, n: int) -> np.ndarray:
    """Returns the set of n-grams of words of a text as sorted 64-bit hashes.

    A text with fewer than n words has all of its words as its only n-gram; a text without words has none.
    """
    words_W = hash_words(text.decode("utf-8"))
    return np.unique(ngram_hashes(words_W, min(n, len(words_W)))) if len(words_W) else words_W


def jaccard(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Returns the Jaccard similarity of two sets, given as sorted arrays of unique values."""
    common = len(np.intersect1d(a_N, b_N, assume_unique=True))
    return common / (len(a_N) + len(b_N) - common)


def remove_near_duplicates(
    recipe: Recipe, folder: Path, buckets: int, output: Path, pool, quiet: bool
) -> int:
    """Drops near duplicates from the buckets, and writes a report of them.

    Documents are visited in a fixed order: held-out documents first, so that no near duplicate of them is
    trained on, then the others, each by hash. A document is dropped if its Jaccard similarity with a kept
    document is at least `recipe.near_similarity`. The result depends neither on the number of workers nor on
    the order of the files.

    Args:
      recipe: similarity and size of the n-grams.
      folder: folder of the bucket files.
      buckets: number of buckets.
      output: JSON lines to write, one per dropped document.
      pool: executor of the workers.
      quiet: show no progress bar.

    Returns:
      The number of dropped documents.

    Raises:
      UserError: if a split is empty afterwards.
    """
    sign = functools.partial(_sign_bucket, folder, recipe.near_words)
    index = Index(recipe, folder)
    dropped = collections.Counter()
    kept = collections.Counter()
    with bar(total=2 * buckets, desc="removing near duplicates", disable=quiet) as progress:
        for _ in map_in_order(pool, sign, range(buckets), lookahead=buckets):
            progress.update()
        with open(output, "w", encoding="utf-8") as report:
            for held_out in (True, False):
                for bucket in range(buckets):
                    digests = []
                    for document, hashes_P in _signed_documents(folder, bucket, held_out):
                        found = index.find_or_add(document, hashes_P)
                        (dropped if found else kept)[held_out] += 1
                        if found:
                            digests.append(document.digest)
                            report.write(_report_line(folder, document, *found))
                    drop_documents(folder, bucket, digests)
                    progress.update(0.5)
    if not kept[True] or not kept[False]:
        raise UserError(
            f"--deduplicate=near leaves no documents to {'train on' if kept[True] else 'hold out'}; raise "
            f"--near_similarity={recipe.near_similarity} or give more text"
        )
    return dropped.total()


@functools.cache
def _empty_signature():
    from datasketch import MinHash

    return MinHash(_PERMUTATIONS, hashfunc=int)


def sign(text: bytes, n: int) -> np.ndarray | None:
    """Returns the MinHash signature of a text, uint32, or None for a text without words."""
    shingles_S = shingles(text, n) >> np.uint64(32)  # datasketch takes 32 bits
    if not len(shingles_S):
        return None
    signature = _empty_signature().copy()
    for start in range(0, len(shingles_S), _BATCH_SHINGLES):
        signature.update_batch(shingles_S[start : start + _BATCH_SHINGLES].tolist())
    return signature.hashvalues


def _sign_bucket(folder: Path, n: int, bucket: int) -> None:
    """Writes the MinHash signatures of a bucket. Runs in a worker process."""
    records, _ = read_records(folder, bucket)
    hashes_NxP = np.zeros((len(records), _PERMUTATIONS), np.uint32)
    has_words_N = np.zeros(len(records), bool)
    for i, record in enumerate(records):
        signature_P = sign(record.text, n)
        has_words_N[i] = signature_P is not None
        if has_words_N[i]:
            hashes_NxP[i] = signature_P
    with open(_signature_file(folder, bucket), "wb") as file:
        np.savez(
            file,
            digests=np.frombuffer(b"".join(r.digest for r in records), f"V{HASH_BYTES}"),
            held_out=np.array([r.held_out for r in records], bool),
            files=np.array([r.location.file for r in records], str),
            spans=np.array([r.location[1:] for r in records], np.int64).reshape(-1, 2),
            hashes=hashes_NxP,
            has_words=has_words_N,
        )


def _signature_file(folder: Path, bucket: int) -> Path:
    return folder / f"signatures-{bucket:06d}.npz"


def _signed_documents(
    folder: Path, bucket: int, held_out: bool
) -> Iterator[tuple[Document, np.ndarray | None]]:
    """Yields the documents of a split with their MinHash signatures, which are None without words."""
    with np.load(_signature_file(folder, bucket)) as arrays:
        arrays = dict(arrays)
    for i in np.flatnonzero(arrays["held_out"] == held_out):
        location = Location(str(arrays["files"][i]), *arrays["spans"][i].tolist())
        document = Document(arrays["digests"][i].tobytes(), held_out, location)
        yield document, arrays["hashes"][i] if arrays["has_words"][i] else None


class Index:
    """The kept documents, indexed by their MinHash signatures."""

    def __init__(self, recipe: Recipe, folder: Path):
        from datasketch import MinHash, MinHashLSH

        self._recipe, self._folder = recipe, folder
        self._signature = MinHash(_PERMUTATIONS)
        threshold = min(recipe.near_similarity, _MAX_LSH_THRESHOLD)
        self._lsh = MinHashLSH(threshold, _PERMUTATIONS, weights=_WEIGHTS, hashfunc=_short_hash)
        self._kept: list[Document] = []
        self._shingles = functools.lru_cache(maxsize=16)(self._read_shingles)

    def find_or_add(self, document: Document, hashes_P: np.ndarray | None) -> tuple[Document, float] | None:
        """Returns the most similar kept document and its similarity; if there is none, keeps the document."""
        if hashes_P is None:
            return None
        signature = self._signature.copy()
        signature.hashvalues = hashes_P
        candidates = sorted(self._lsh.query(signature))
        if candidates:
            own_N = shingles(read_text(self._folder, document.location), self._recipe.near_words)
            similarities = [jaccard(own_N, self._shingles(i)) for i in candidates]
            best = int(np.argmax(similarities))
            if similarities[best] >= self._recipe.near_similarity:
                return self._kept[candidates[best]], similarities[best]
        self._lsh.insert(len(self._kept), signature)
        self._kept.append(document)
        return None

    def _read_shingles(self, index: int) -> np.ndarray:
        return shingles(read_text(self._folder, self._kept[index].location), self._recipe.near_words)


def _short_hash(band: bytes) -> bytes:
    """Hashes a band of a signature, which makes the index smaller."""
    return hashlib.blake2b(band, digest_size=8).digest()


def _report_line(folder: Path, document: Document, kept: Document, similarity: float) -> str:
    def describe(one: Document) -> dict:
        text = read_text(folder, one.location).decode("utf-8")
        return {
            "blake2b": one.digest.hex(),
            "split": "valid" if one.held_out else "train",
            "bytes": one.location.size,
            "start": text[:_EXCERPT],
        }

    entry = {"similarity": similarity, "dropped": describe(document), "kept": describe(kept)}
    return json.dumps(entry, ensure_ascii=False) + "\n"
