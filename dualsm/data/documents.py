"""Documents of a corpus split, with random access to their tokens.

A document is `<s> text </s>`, little-endian uint16 (uint32 for vocabularies above 65,536). It is stored in
records of `RECORD_TOKENS` tokens, so that a segment of a long document can be read without the rest.
"""

from __future__ import annotations

import bisect
import functools
import resource
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from grain.sources import ArrayRecordDataSource

from dualsm.data.document_lengths import RECORD_TOKENS, open_lengths
from dualsm.data.record_index import RecordIndex
from dualsm.process.errors import UserError
from dualsm.process.paths import is_remote, retry, size_and_time

_OTHER_FILES = 64  # reserve for open files other than shards


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the dtype of stored tokens."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Documents:
    """The documents of one split, with random access.

    Attributes:
      lengths: tokens of each document, `<s>` and `</s>` included.
      tokens: tokens of the split.
      bytes: bytes of text of the split.
      bytes_N: bytes of text of each document, int64; None for the training split and for corpora of earlier
        versions.
      domains: names of the domains; empty if they are not recorded.
      domain_N: index of each document's domain, uint16; None if the domains are not recorded.
    """

    def __init__(
        self, folder: epath.Path, split: dict, dtype: np.dtype, check: Callable[[], None] = lambda: None
    ):
        """Opens the files of a split.

        Args:
          folder: folder of the corpus.
          split: entry of the split in the manifest.
          dtype: dtype of the stored tokens.
          check: called before each read; raises `UserError` if the corpus is known to be damaged.

        Raises:
          UserError: if a file is damaged, or the files do not match.
        """
        self.tokens: int = split["tokens"]
        self.bytes: int = split["bytes"]
        self.bytes_N = self.domain_N = None
        self.domains: list[str] = list(split.get("domains", {}))
        self._dtype, self._remote, self._check = dtype, is_remote(folder), check
        self._shards = [folder / shard["file"] for shard in split["shards"]]
        if not self._remote:
            _allow_open_files(len(split["shards"]))
        try:
            self._source = retry(lambda: ArrayRecordDataSource(list(map(str, self._shards))), folder)
            if "document_bytes" in split:
                self.bytes_N = np.frombuffer((folder / split["document_bytes"]).read_bytes(), "<i8")
            if self.domains:
                self.domain_N = np.frombuffer((folder / split["document_domains"]).read_bytes(), "<u2")
            records = len(self._source)
        except (RuntimeError, ValueError, OSError) as error:
            if _is_unreachable(self._shards[0]):
                raise
            damaged = next((shard for shard in self._shards if not _is_readable(shard)), None)
            name = f"corpus {folder}" if damaged is None else f"corpus shard {damaged}"
            raise UserError(
                f"{name} is damaged ({_first_line(error)}); copy or prepare the corpus again"
            ) from error
        self.lengths = open_lengths(folder, split)
        self._record_index = RecordIndex(self.lengths)
        self._shard_ends = np.cumsum([shard["documents"] for shard in split["shards"]])  # in documents
        if (self.lengths.records, self.lengths.tokens) != (records, self.tokens):
            raise UserError(
                f"corpus {folder}: {split['lengths']} does not match the shards; prepare the corpus again"
            )
        if self.bytes_N is not None and (len(self.bytes_N), self.bytes_N.sum()) != (len(self), self.bytes):
            raise UserError(
                f"corpus {folder}: {split['document_bytes']} does not match the shards; prepare it again"
            )
        if self.domain_N is not None:
            counts = np.bincount(self.domain_N, minlength=len(self.domains)).tolist()
            if len(self.domain_N) != len(self) or counts != list(split["domains"].values()):
                raise UserError(
                    f"corpus {folder}: {split['document_domains']} does not match the manifest; prepare it "
                    "again"
                )

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def lengths_N(self) -> np.ndarray:
        """Tokens of each document, int32. Reads the lengths of the whole split, 4 bytes per document."""
        return self.lengths.read(range(len(self.lengths.token_ends_M)))

    def read(self, document_S: Sequence[int], start_S=None, stop_S=None) -> list[np.ndarray]:
        """Reads the tokens of documents, or of a segment of each document. Thread-safe.

        Args:
          document_S: indices of documents.
          start_S, stop_S: token ranges within the documents; by default, the whole documents.

        Returns:
          One array of tokens per segment.

        Raises:
          UserError: if the checksum of a record is wrong; the message names the shard.
          BucketError: if a bucket does not answer.
        """
        self._check()
        document_S = np.asarray(document_S, np.int64)
        start_S = np.zeros_like(document_S) if start_S is None else np.asarray(start_S)
        stop_S = self.lengths.at(document_S) if stop_S is None else np.asarray(stop_S)
        skipped_S = start_S // RECORD_TOKENS
        count_S = (stop_S - 1) // RECORD_TOKENS - skipped_S + 1
        first_S = self._record_index.first(document_S) + skipped_S
        indices = [i for first, n in zip(first_S, count_S, strict=True) for i in range(first, first + n)]
        try:
            records = iter(retry(lambda: self._read_records(indices), self._shards[0]))
        except (RuntimeError, ValueError, OSError) as error:
            if _is_unreachable(self._shards[0]):
                raise
            raise UserError(
                f"corpus shard {self._damaged_shard(indices)} is damaged or missing ({_first_line(error)}); "
                "copy or prepare the corpus again"
            ) from error
        tokens_S = []
        offset_S = skipped_S * RECORD_TOKENS
        for count, start, stop in zip(count_S, start_S - offset_S, stop_S - offset_S, strict=True):
            content = next(records) if count == 1 else b"".join(next(records) for _ in range(count))
            tokens_S.append(np.frombuffer(content, self._dtype)[start:stop])
        return tokens_S

    def _damaged_shard(self, indices: list[int]) -> epath.Path | str:
        """Returns the shard of the first record that cannot be read."""
        for index in indices:
            try:
                self._source[index]
            except (RuntimeError, ValueError, OSError):
                return self._shards[bisect.bisect_right(self._shard_ends, index, key=self._first_record)]
        return "(unknown)"  # the second read succeeded

    def _first_record(self, document: int) -> int:
        """Returns the index of the first record of a document; the number of records after the last one."""
        if document == len(self):
            return self.lengths.records
        return int(self._record_index.first(np.array([document]))[0])

    def _read_records(self, indices: list[int]) -> Sequence[bytes]:
        # `__getitems__` starts threads in each call. The threads hide the latency of a bucket, but cost
        # several times as much as reading from a disk (benchmarks/data.py).
        if self._remote:
            return self._source.__getitems__(indices)
        return [self._source[index] for index in indices]


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


def _is_unreachable(shard: epath.Path) -> bool:
    """Returns True if a shard is in a bucket that does not answer: then no shard need be damaged."""
    if not is_remote(shard):
        return False
    try:
        size_and_time(shard)
    except Exception as error:  # the network libraries raise various errors
        return not isinstance(error, FileNotFoundError)
    return False


def _is_readable(shard: epath.Path) -> bool:
    """Returns False if the index of a shard cannot be read."""
    try:
        ArrayRecordDataSource([str(shard)])
    except (RuntimeError, ValueError, OSError):
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
