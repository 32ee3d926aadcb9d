"""Lengths of the documents of a split, read in groups, so that memory does not grow with the corpus.

The file of lengths has four bytes per document, which is 4 GB for a billion documents. Its index has three
numbers per group of `GROUP_SIZE` consecutive documents: tokens, records, and the CRC-32 of the group's
lengths, which is checked whenever the group is read.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath

from dualsm.data.damaged_corpus import DamagedCorpus
from dualsm.process.errors import BucketError, UserError
from dualsm.process.paths import open_binary, read_ranges, retry, size_and_time

RECORD_TOKENS = 2048  # tokens per stored record, at most
GROUP_SIZE = 1 << 14  # documents; a change needs a new `sequence_order.ORDER_VERSION`
_DTYPE = np.dtype("<i4")
_GROUPS_PER_READ = 64


def record_count(tokens):
    """Returns the number of records per document, given the lengths of documents in tokens."""
    return -(-tokens // RECORD_TOKENS)


def index_lengths(lengths_N: np.ndarray, group_size: int = GROUP_SIZE) -> np.ndarray:
    """Returns the index of a file of lengths: tokens, records and CRC-32 of each group, int64 [M, 3]."""
    parts = np.split(np.asarray(lengths_N, _DTYPE), range(group_size, len(lengths_N), group_size))
    rows = [(part.sum(dtype=np.int64), record_count(part).sum(dtype=np.int64), _crc(part)) for part in parts]
    return np.array(rows, "<i8")


def _crc(lengths_G: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(lengths_G))


class DocumentLengths:
    """Tokens of each document of a split, with random access to groups of documents. Thread-safe.

    Attributes:
      group_size: documents per group; the last group may have fewer.
      token_ends_M: int64; tokens up to the end of each group.
      record_ends_M: int64; records up to the end of each group.
    """

    def __init__(
        self,
        documents: int,
        index_Mx3: np.ndarray,
        read_groups: Callable[[Sequence[int]], list[np.ndarray]],
        group_size: int = GROUP_SIZE,
    ):
        """
        Args:
          documents: number of documents.
          index_Mx3: index of the lengths; see `index_lengths`.
          read_groups: returns the lengths of each of the given groups.
          group_size: documents per group.
        """
        self.group_size, self._documents, self._read_groups = group_size, documents, read_groups
        self.token_ends_M, self.record_ends_M = np.cumsum(index_Mx3[:, :2], axis=0).T

    @classmethod
    def from_array(cls, lengths_N: Sequence[int], group_size: int = GROUP_SIZE) -> DocumentLengths:
        """Returns lengths that are in memory."""
        lengths_N = np.asarray(lengths_N, _DTYPE)

        def read_groups(group_K):
            return [lengths_N[group * group_size : (group + 1) * group_size] for group in group_K]

        return cls(len(lengths_N), index_lengths(lengths_N, group_size), read_groups, group_size)

    def __len__(self) -> int:
        return self._documents

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.token_ends_M[-1])

    @property
    def records(self) -> int:
        """Records of all documents."""
        return int(self.record_ends_M[-1])

    def documents_of(self, group_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first document of each group, and the number of documents in it."""
        first_K = np.asarray(group_K, np.int64) * self.group_size
        return first_K, np.minimum(self.group_size, len(self) - first_K)

    def read(self, group_K: Sequence[int]) -> np.ndarray:
        """Returns the lengths of the documents in the given groups, one group after the other, int32.

        Raises:
          DamagedCorpus: if the file of lengths is damaged.
          UserError: if it cannot be read.
          BucketError: if a bucket does not answer.
        """
        return np.concatenate(self._read_groups(group_K))

    def at(self, document_S: np.ndarray) -> np.ndarray:
        """Returns the lengths of the given documents, int32."""
        group_K, index_S = np.unique(document_S // self.group_size, return_inverse=True)
        return self.read(group_K)[index_S * self.group_size + document_S % self.group_size]


def open_lengths(folder: epath.Path, split: dict, group_size: int = GROUP_SIZE) -> DocumentLengths:
    """Opens the lengths of the documents of a split.

    Only the index is read. Corpora of earlier versions have none; it is computed from all lengths then.

    Args:
      folder: folder of the corpus.
      split: entry of the split in the manifest.
      group_size: documents per group; that of the index.

    Raises:
      DamagedCorpus: if a file is damaged.
      UserError: if a file cannot be read.
      BucketError: if a bucket does not answer.
    """
    path, documents = folder / split["lengths"], sum(shard["documents"] for shard in split["shards"])
    try:
        with _os_errors_as_user_errors(path):
            size = retry(lambda: size_and_time(path)[0], path)
            if "lengths_index" in split:
                content = retry((folder / split["lengths_index"]).read_bytes, path)
                index_Mx3 = np.frombuffer(content, "<i8").reshape(-1, 3)
            else:
                index_Mx3 = retry(lambda: _index_file(path, group_size), path)
    except ValueError as error:
        raise DamagedCorpus(f"the index of {path} is damaged ({error})") from error
    if (size, len(index_Mx3)) != (documents * _DTYPE.itemsize, -(-documents // group_size)):
        raise DamagedCorpus(f"{path} or its index does not match the shards")

    def read_groups(group_K: Sequence[int]) -> list[np.ndarray]:
        group_bytes = group_size * _DTYPE.itemsize
        ranges = [(group * group_bytes, min((group + 1) * group_bytes, size)) for group in group_K]
        with _os_errors_as_user_errors(path):
            contents = retry(lambda: read_ranges(path, ranges), path)
        for content, expected in zip(contents, index_Mx3[group_K, 2].tolist(), strict=True):
            if zlib.crc32(content) != expected:
                raise DamagedCorpus(f"{path} is damaged (a checksum has changed)")
        return [np.frombuffer(content, _DTYPE) for content in contents]

    return DocumentLengths(documents, index_Mx3, read_groups, group_size)


@contextlib.contextmanager
def _os_errors_as_user_errors(path: epath.Path) -> Iterator[None]:
    """Raises `UserError` for an operating system's error on `path`; passes `BucketError` on."""
    try:
        yield
    except BucketError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; copy it again") from error


def _index_file(path: epath.Path, group_size: int) -> np.ndarray:
    """Returns the index of a file of lengths, which is read in bounded memory."""
    parts = []
    with open_binary(path) as file:
        while chunk := file.read(_GROUPS_PER_READ * group_size * _DTYPE.itemsize):
            parts.append(index_lengths(np.frombuffer(chunk, _DTYPE), group_size))
    return np.concatenate(parts)
