"""A prepared corpus on disk: the manifest and random access to the tokens of a document.

A corpus is a folder with `tokenizer.model`, `manifest.json`, and per split ("train", "valid") ArrayRecord
shards and one file with the lengths of all documents. A document is `<s> text </s>`, little-endian uint16
(uint32 for vocabularies above 65,536), cut into records of `RECORD_TOKENS` so that a row out of a long
document can be read without the rest. Documents lie in the order of their hash, so every prefix of a split
is a fair sample of it.
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
_HASHED_AT_ONCE = 8  # files
_OTHER_FILES = 64  # that a process may have open beside the shards


def token_dtype(vocab_size: int) -> np.dtype:
    """The type tokens are stored in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def record_count(tokens):
    """Records that documents of the given lengths are cut into."""
    return -(-tokens // RECORD_TOKENS)


def sha256(path: epath.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _array_keys(split: dict) -> list[str]:
    """Returns the keys of a split's files that hold one number for each document."""
    return ["lengths", *(["document_bytes"] if "document_bytes" in split else [])]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _positive(value) -> int:
    """`value`, if it is a whole number above 0. Raises TypeError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TypeError(f"{value!r} where a number above 0 should be")
    return value


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files by `count`, as each shard stays open once it was read.

    Raises:
      UserError: when the system allows fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard):
        return
    if hard < count + _OTHER_FILES:
        raise UserError(
            f"the corpus has {count} shards, but a process may open only {hard} files here; raise the limit "
            f"with `ulimit -Hn {count + _OTHER_FILES}` or more"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + count, hard), hard))


class Documents:
    """One split of a corpus, as a random-access sequence of documents.

    Attributes:
      lengths_N: tokens of each document, `<s>` and `</s>` included, int32.
      tokens: their sum.
      bytes: bytes of text of the split.
      bytes_N: bytes of text of each document, int64; None for the training split, and for corpora that were
        prepared by an earlier version.
    """

    def __init__(self, folder: epath.Path, split: dict, dtype: np.dtype):
        """Raises `UserError` when the files do not fit together."""
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
            raise UserError(f"corpus {folder} is damaged: {_first_line(error)}") from error
        records_N = record_count(self.lengths_N)
        self._first_record_N = np.cumsum(records_N) - records_N
        if records_N.sum() != records or self.lengths_N.sum(dtype=np.int64) != self.tokens:
            raise UserError(
                f"corpus {folder}: {split['lengths']} does not fit its shards; prepare the corpus anew"
            )
        if self.bytes_N is not None and (len(self.bytes_N), self.bytes_N.sum()) != (len(self), self.bytes):
            raise UserError(
                f"corpus {folder}: {split['document_bytes']} does not fit its shards; prepare the corpus anew"
            )

    def __len__(self) -> int:
        return len(self.lengths_N)

    def read(self, document_S: Sequence[int], start_S=None, stop_S=None) -> list[np.ndarray]:
        """Tokens of the given documents, or of the parts [start, stop) of them; one array each. Thread-safe.

        Raises:
          UserError: when a shard is damaged (its own checksums tell).
        """
        document_S = np.asarray(document_S, np.int64)
        start_S = np.zeros_like(document_S) if start_S is None else np.asarray(start_S)
        stop_S = self.lengths_N[document_S] if stop_S is None else np.asarray(stop_S)
        skipped_S = start_S // RECORD_TOKENS
        size_S = (stop_S - 1) // RECORD_TOKENS - skipped_S + 1
        first_S = self._first_record_N[document_S] + skipped_S
        numbers = [n for first, size in zip(first_S, size_S, strict=True) for n in range(first, first + size)]
        try:
            records = iter(self._records(numbers))
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"corpus shard damaged or gone: {_first_line(error)}") from error
        pieces = []
        for size, start, stop in zip(
            size_S, start_S - skipped_S * RECORD_TOKENS, stop_S - skipped_S * RECORD_TOKENS, strict=True
        ):
            joined = next(records) if size == 1 else b"".join(next(records) for _ in range(size))
            pieces.append(np.frombuffer(joined, self._dtype)[start:stop])
        return pieces

    def _records(self, numbers: list[int]) -> Sequence[bytes]:
        """The records of those numbers."""
        if self._remote:
            return self._source.__getitems__(numbers)
        # Together they are read by threads that are started for each call, which hides the latency of a
        # bucket but costs several times what reading from a disk does (benchmarks/data.py).
        return [self._source[number] for number in numbers]


class Corpus:
    """A folder made by `python -m dualsm.prepare`.

    Attributes:
      folder: where it is.
      manifest: the parsed `manifest.json`.
      vocabulary: number of token ids.
      identity: hash of the tokenizer and of every shard; equal for equal corpora, wherever they lie.
    """

    def __init__(self, path: str):
        """Raises `UserError` when `path` holds no whole corpus."""
        self.folder = epath.Path(path).expanduser()
        try:
            self.manifest = json.loads((self.folder / MANIFEST).read_text())
        except OSError as error:
            raise UserError(
                f"no corpus at {path!r} ({MANIFEST} is missing); make one with "
                "`python -m dualsm.prepare --input=... --output=...` and set config.data.path"
            ) from error
        except ValueError as error:
            raise UserError(f"{self.folder / MANIFEST} is no JSON: {error}") from error
        try:
            self._check()
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.folder / MANIFEST} is damaged ({error!r})") from error

    def _check(self) -> None:
        if self.manifest["format"] != FORMAT:
            raise UserError(
                f"corpus {self.folder} has format {self.manifest['format']}, this version reads {FORMAT}"
            )
        self.vocab_size: int = _positive(self.manifest["vocabulary"])
        self.identity: str = self.manifest["identity"]
        for split in (self.manifest["splits"][name] for name in SPLITS):
            _positive(split["tokens"]), _positive(split["bytes"])
            if not all(isinstance(split[f"{key}_sha256"], str) for key in _array_keys(split)):
                raise TypeError("a hash that is not a string")
            for name in [split[key] for key in _array_keys(split)] + [s["file"] for s in split["shards"]]:
                if not re.fullmatch(r"\w[\w.-]*", name):
                    raise UserError(f"{self.folder / MANIFEST} names a file outside its folder: {name}")
            for shard in split["shards"]:
                path = self.folder / shard["file"]
                if not path.exists() or path.stat().length != shard["size"]:
                    raise UserError(f"corpus shard {path} is missing or cut short; prepare the corpus anew")

    def verify(self, split: str) -> None:
        """Reads every file of a split; raises `UserError`, naming it, for one whose hash has changed.

        What `Documents.read` returns has been checked by the shards' own checksums, record by record; this
        tells before any record is needed, and of whole files that were exchanged.
        """
        parts = self.manifest["splits"][split]
        expected = {shard["file"]: shard["sha256"] for shard in parts["shards"]}
        with futures.ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
            found = pool.map(lambda name: sha256(self.folder / name), expected)
            for name, digest in zip(expected, found, strict=True):
                if digest != expected[name]:
                    raise UserError(
                        f"corpus shard {self.folder / name} is damaged: its content is not what was written; "
                        "copy or prepare the corpus anew"
                    )

    def documents(self, split: str) -> Documents:
        """The documents of "train" or "valid"."""
        parts = self.manifest["splits"][split]
        for key in _array_keys(parts):
            self._check_array(self.folder / parts[key], parts[f"{key}_sha256"])
        return Documents(self.folder, parts, token_dtype(self.vocab_size))

    @staticmethod
    def _check_array(path: epath.Path, expected: str) -> None:
        """Raises `UserError` for a file that is missing or has changed."""
        try:
            changed = sha256(path) != expected
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        if changed:
            raise UserError(f"{path} is damaged: its content is not what was written")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with."""
        tokenizer = load_tokenizer(str(self.folder / TOKENIZER))
        if tokenizer.sha256() != self.manifest["tokenizer_sha256"]:
            raise UserError(f"{self.folder / TOKENIZER} is not the tokenizer this corpus was made with")
        return tokenizer
