"""Random access to the records of a split, which are stored in shards."""

from __future__ import annotations

import resource
import threading
from collections.abc import Sequence
from concurrent import futures

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from dualsm.data.damaged_corpus import DamagedCorpus
from dualsm.process.errors import UserError
from dualsm.process.paths import is_remote, retry, size_and_time

_OTHER_FILES = 64  # reserve for open files other than shards
_THREADS = 64  # hide the latency of a bucket
# Options for random access: more bytes per read would belong to records that are not requested.
_OPTIONS, _BUFFER_BYTES = "readahead_buffer_size:0", 1 << 15


class RecordReader:
    """Reads records by their index in a split. Opens a shard when it is first read. Thread-safe."""

    def __init__(self, shards: Sequence[epath.Path], counts: Sequence[int]):
        """
        Args:
          shards: the shards of the split.
          counts: number of records of each shard.

        Raises:
          UserError: if a process cannot have so many files open.
        """
        self._shards, self._counts, self._end_S = shards, counts, np.cumsum(counts)
        self._first_S = self._end_S - counts
        self._readers: list[ArrayRecordReader | None] = [None] * len(shards)
        self._locks = [threading.Lock() for _ in shards]
        self._remote = is_remote(shards[0])
        if not self._remote:
            _allow_open_files(len(shards))

    def __len__(self) -> int:
        return int(self._end_S[-1])

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the records with the given indices.

        Raises:
          DamagedCorpus: if a shard is missing or damaged; the message names it.
          BucketError: if a bucket does not answer.
        """
        index_N = np.asarray(indices, np.int64)
        shard_N = np.searchsorted(self._end_S, index_N, side="right")
        position_N = index_N - self._first_S[shard_N]
        # Threads hide the latency of a bucket, but cost several times as much as reading from a disk
        # (benchmarks/data.py).
        if not self._remote:
            places = zip(shard_N.tolist(), position_N.tolist(), strict=True)
            return [self._read_shard(shard, [position])[0] for shard, position in places]
        groups = [np.flatnonzero(shard_N == shard) for shard in np.unique(shard_N)]
        records: list[bytes] = [b""] * len(index_N)
        with futures.ThreadPoolExecutor(min(len(groups), _THREADS)) as pool:
            parts = pool.map(
                lambda group: self._read_shard(int(shard_N[group[0]]), position_N[group].tolist()), groups
            )
            for group, part in zip(groups, parts, strict=True):
                for place, record in zip(group.tolist(), part, strict=True):
                    records[place] = record
        return records

    def _read_shard(self, shard: int, positions: list[int]) -> Sequence[bytes]:
        path = self._shards[shard]
        try:
            if not self._remote:  # `retry` would cost as much as the read
                return self._open(shard).read(positions)
            return retry(lambda: self._open(shard).read(positions), path)
        except (RuntimeError, ValueError, OSError) as error:
            if _is_unreachable(path):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DamagedCorpus(f"corpus shard {path} is damaged or missing ({reason})") from error

    def _open(self, shard: int) -> ArrayRecordReader:
        """Returns the reader of a shard, which is replaced after an error."""
        if (opened := self._readers[shard]) is not None and opened.ok():
            return opened
        with self._locks[shard]:
            reader = self._readers[shard]
            if reader is None or not reader.ok():
                path, expected = self._shards[shard], self._counts[shard]
                reader = ArrayRecordReader(str(path), options=_OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)
                if not reader.ok():
                    reader.close()  # raises the error
                if reader.num_records() != expected:
                    raise DamagedCorpus(
                        f"corpus shard {path} is damaged (it has {reader.num_records()} records instead of "
                        f"{expected})"
                    )
                self._readers[shard] = reader
            return reader


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
            f"the corpus has {count} shards, but a process may open at most {hard} files; an administrator "
            f"has to raise the hard limit of open files to {count + _OTHER_FILES} (nofile in limits.conf, "
            "systemd LimitNOFILE, docker --ulimit nofile)"
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
