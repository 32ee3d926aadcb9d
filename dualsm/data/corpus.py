"""Corpora: the manifest, and random access to the tokens of documents.

A corpus is a folder with `tokenizer.model`, `manifest.json` and, for each split ("train" and "valid"),
ArrayRecord shards and a file with the lengths of all documents. A document is `<s> text </s>`, little-endian
uint16 (uint32 for vocabularies above 65,536). It is stored in records of `RECORD_TOKENS` tokens, so that a
segment of a long document can be read without the rest. Documents are sorted by hash, so every prefix of a
split is a random sample of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import resource
from collections.abc import Sequence
from concurrent import futures

import numpy as np
from etils import epath
from grain.sources import ArrayRecordDataSource

from dualsm.data.tokenizer import Tokenizer
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.process.errors import UserError

FORMAT = 1
RECORD_TOKENS = 2048
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
SPLITS = ("train", "valid")
_HASH_THREADS = 8
_OTHER_FILES = 64  # reserve for open files other than shards


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the dtype of stored tokens."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def record_count(tokens):
    """Returns the number of records per document, given the lengths of documents in tokens."""
    return -(-tokens // RECORD_TOKENS)


def sha256(path: epath.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _array_keys(split: dict) -> list[str]:
    """Returns the manifest keys of the files with one number per document."""
    return ["lengths", *(["document_bytes"] if "document_bytes" in split else [])]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _positive(value) -> int:
    """Returns `value` if it is a positive integer, and raises `TypeError` otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TypeError(f"{value!r} is not a positive integer")
    return value


def _allow_open_files(count: int) -> None:
    """Raises the soft limit on open files by `count`, because shards stay open after the first read.

    Raises:
      UserError: if the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard):
        return
    if hard < count + _OTHER_FILES:
        raise UserError(
            f"the corpus has {count} shards, but a process may open at most {hard} files; raise the limit "
            f"with `ulimit -Hn {count + _OTHER_FILES}` or more"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + count, hard), hard))


class Documents:
    """The documents of one split, with random access.

    Attributes:
      lengths_N: tokens of each document, `<s>` and `</s>` included, int32.
      tokens: tokens of the split.
      bytes: bytes of text of the split.
      bytes_N: bytes of text of each document, int64; None for the training split and for corpora of earlier
        versions.
    """

    def __init__(self, folder: epath.Path, split: dict, dtype: np.dtype):
        """Opens the files of a split.

        Args:
          folder: folder of the corpus.
          split: entry of the split in the manifest.
          dtype: dtype of the stored tokens.

        Raises:
          UserError: if a file is damaged, or the files do not match.
        """
        self.tokens: int = split["tokens"]
        self.bytes: int = split["bytes"]
        self.bytes_N = None
        self._dtype, self._remote = dtype, "://" in str(folder)
        if not self._remote:
            _allow_open_files(len(split["shards"]))
        try:
            self._source = ArrayRecordDataSource([str(folder / s["file"]) for s in split["shards"]])
            self.lengths_N = np.frombuffer((folder / split["lengths"]).read_bytes(), "<i4")
            if "document_bytes" in split:
                self.bytes_N = np.frombuffer((folder / split["document_bytes"]).read_bytes(), "<i8")
            records = len(self._source)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"corpus {folder} is damaged ({_first_line(error)}); copy or prepare it again"
            ) from error
        records_N = record_count(self.lengths_N)
        self._first_record_N = np.cumsum(records_N) - records_N
        if records_N.sum() != records or self.lengths_N.sum(dtype=np.int64) != self.tokens:
            raise UserError(
                f"corpus {folder}: {split['lengths']} does not match the shards; prepare the corpus again"
            )
        if self.bytes_N is not None and (len(self.bytes_N), self.bytes_N.sum()) != (len(self), self.bytes):
            raise UserError(
                f"corpus {folder}: {split['document_bytes']} does not match the shards; prepare it again"
            )

    def __len__(self) -> int:
        return len(self.lengths_N)

    def read(self, document_S: Sequence[int], start_S=None, stop_S=None) -> list[np.ndarray]:
        """Reads the tokens of documents, or of a segment of each document. Thread-safe.

        Args:
          document_S: indices of documents.
          start_S, stop_S: token ranges within the documents; by default, the whole documents.

        Returns:
          One array of tokens per segment.

        Raises:
          UserError: if the checksum of a record is wrong.
        """
        document_S = np.asarray(document_S, np.int64)
        start_S = np.zeros_like(document_S) if start_S is None else np.asarray(start_S)
        stop_S = self.lengths_N[document_S] if stop_S is None else np.asarray(stop_S)
        skipped_S = start_S // RECORD_TOKENS
        count_S = (stop_S - 1) // RECORD_TOKENS - skipped_S + 1
        first_S = self._first_record_N[document_S] + skipped_S
        indices = [i for first, n in zip(first_S, count_S, strict=True) for i in range(first, first + n)]
        try:
            records = iter(self._read_records(indices))
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"corpus shard damaged or missing ({_first_line(error)}); copy or prepare the corpus again"
            ) from error
        tokens_S = []
        offset_S = skipped_S * RECORD_TOKENS
        for count, start, stop in zip(count_S, start_S - offset_S, stop_S - offset_S, strict=True):
            content = next(records) if count == 1 else b"".join(next(records) for _ in range(count))
            tokens_S.append(np.frombuffer(content, self._dtype)[start:stop])
        return tokens_S

    def _read_records(self, indices: list[int]) -> Sequence[bytes]:
        # `__getitems__` starts threads in each call. The threads hide the latency of a bucket, but cost
        # several times as much as reading from a disk (benchmarks/data.py).
        if self._remote:
            return self._source.__getitems__(indices)
        return [self._source[index] for index in indices]


class Corpus:
    """A corpus written by `python -m dualsm.prepare`.

    Attributes:
      folder: path of the corpus.
      manifest: the parsed `manifest.json`.
      vocab_size: number of token ids.
      identity: hash of the tokenizer and all shards; does not depend on the path.
    """

    def __init__(self, path: str):
        """Opens a corpus.

        Raises:
          UserError: if `path` is not a complete corpus.
        """
        self.folder = epath.Path(path).expanduser()
        try:
            self.manifest = json.loads((self.folder / MANIFEST).read_text())
        except OSError as error:
            raise UserError(
                f"no corpus at {path!r} ({MANIFEST} is missing); make one with "
                "`python -m dualsm.prepare --input=... --output=...` and set config.data.path"
            ) from error
        except ValueError as error:
            raise UserError(f"{self.folder / MANIFEST} is not JSON ({error}); copy it again") from error
        try:
            self._check()
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.folder / MANIFEST} is damaged ({error!r}); copy the corpus again"
            ) from error

    def _check(self) -> None:
        if self.manifest["format"] != FORMAT:
            raise UserError(
                f"corpus {self.folder} has format {self.manifest['format']}, but this version of dualsm "
                f"reads format {FORMAT}; prepare the corpus again"
            )
        self.vocab_size: int = _positive(self.manifest["vocabulary"])
        self.identity: str = self.manifest["identity"]
        for split in (self.manifest["splits"][name] for name in SPLITS):
            _positive(split["tokens"]), _positive(split["bytes"])
            if not all(isinstance(split[f"{key}_sha256"], str) for key in _array_keys(split)):
                raise TypeError("hash is not a string")
            for name in [split[key] for key in _array_keys(split)] + [s["file"] for s in split["shards"]]:
                if not re.fullmatch(r"\w[\w.-]*", name):
                    raise UserError(
                        f"{self.folder / MANIFEST} refers to {name!r}, which is outside the corpus folder"
                    )
            for shard in split["shards"]:
                path = self.folder / shard["file"]
                if not path.exists() or path.stat().length != shard["size"]:
                    raise UserError(f"corpus shard {path} is missing or truncated; prepare the corpus again")

    def verify(self, split: str) -> None:
        """Reads every shard of a split and checks its hash.

        `Documents.read` checks records by their own checksums. This method finds damage before a record is
        read, and also finds shards that were replaced.

        Raises:
          UserError: if the hash of a shard has changed. The message names the shard.
        """
        expected = {shard["file"]: shard["sha256"] for shard in self.manifest["splits"][split]["shards"]}
        with futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
            found = pool.map(lambda name: sha256(self.folder / name), expected)
            for name, digest in zip(expected, found, strict=True):
                if digest != expected[name]:
                    raise UserError(
                        f"corpus shard {self.folder / name} is damaged (its hash has changed); "
                        "copy or prepare the corpus again"
                    )

    def documents(self, split: str) -> Documents:
        """Returns the documents of the split "train" or "valid"."""
        entry = self.manifest["splits"][split]
        for key in _array_keys(entry):
            self._check_array(self.folder / entry[key], entry[f"{key}_sha256"])
        return Documents(self.folder, entry, token_dtype(self.vocab_size))

    @staticmethod
    def _check_array(path: epath.Path, expected: str) -> None:
        """Raises `UserError` if a file is missing or has changed."""
        try:
            changed = sha256(path) != expected
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        if changed:
            raise UserError(f"{path} is damaged (its hash has changed); copy or prepare the corpus again")

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer of the corpus."""
        tokenizer = load_tokenizer(str(self.folder / TOKENIZER))
        if tokenizer.sha256() != self.manifest["tokenizer_sha256"]:
            raise UserError(
                f"{self.folder / TOKENIZER} is not the tokenizer that the corpus was prepared with; "
                "copy the corpus again"
            )
        return tokenizer
