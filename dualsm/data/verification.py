"""Verification of the hashes of a corpus in the background, during training."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping

from etils import epath

from dualsm.data.damaged_corpus import DamagedCorpus
from dualsm.devices.chips import usable_cores
from dualsm.process.errors import BucketError, UserError
from dualsm.process.paths import retry

_CORES_PER_THREAD, _MAX_THREADS = 4, 8  # leave most cores to training


def sha256(path: epath.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_hash(path: epath.Path, expected: str) -> None:
    """Compares the hash of a file of a corpus with the expected one.

    Raises:
      DamagedCorpus: if the hash has changed; the message names the file.
      UserError: if the file cannot be read.
      BucketError: if a bucket still fails after retries.
    """
    try:
        found = retry(lambda: sha256(path), path)
    except BucketError:
        raise
    except OSError as error:
        raise UserError(
            f"corpus file {path} cannot be read ({error}); check the disk, or copy the corpus again"
        ) from error
    if found != expected:
        raise DamagedCorpus(f"corpus file {path} is damaged (its hash has changed)")


class Verification:
    """Checks the hashes of the files of a corpus in daemon threads.

    A training run reads records that are not verified yet. ArrayRecord verifies a checksum of each record,
    which detects flipped bytes; the hashes also detect a shard that was replaced by another one.
    """

    def __init__(self, sha256_by_path: Mapping[epath.Path, str]):
        """Starts the threads.

        Args:
          sha256_by_path: expected hash of each file.
        """
        self._todo, self._lock = iter(sha256_by_path.items()), threading.Lock()
        self._damage: Exception | None = None
        count = min(max(int(usable_cores()) // _CORES_PER_THREAD, 1), _MAX_THREADS)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Raises `UserError`, naming the file, if damage has been found so far.

        Raises an unexpected exception of a thread too: its files are not verified.
        """
        if self._damage is not None:
            raise self._damage

    def finish(self, timeout: float | None = None) -> bool:
        """Waits until all files are verified, at most `timeout` seconds; raises the exceptions of `check`.

        Returns:
          True if all files are verified.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(deadline and max(deadline - time.monotonic(), 0))
        self.check()
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while self._damage is None:
            with self._lock:
                shard = next(self._todo, None)
            if shard is None:
                return
            try:
                check_hash(*shard)
            except Exception as error:
                self._damage = error
