"""Barriers for saves in a job of several processes. The barriers end when one process fails.

Orbax's own barriers do not notice a failure: the other processes would wait for minutes, or forever in a
collective operation on the devices.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import jax
from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator
from orbax.checkpoint._src.multihost import multihost

from dualsm.process import distributed
from dualsm.process.distributed import PeerError

_PREFIX = "dualsm_save"


class SaveBarrier:
    """A sequence of barriers for one checkpoint manager.

    Processes pass the same barriers in the same order. A process that fails skips barriers and arrives at a
    later one, or reports its failure. The keys of the barriers then differ between the processes, and all
    processes raise `PeerError`, at this barrier and at all later ones.
    """

    def __init__(self, number: int):
        """
        Args:
          number: number of the manager; the same in all processes, and different for each manager.
        """
        self._folder, self._arrivals = f"{_PREFIX}/{number}", itertools.count()
        self._broken = jax.process_count() == 1

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes; the signature is that of Orbax's `barrier_sync_fn`."""
        if jax.process_count() == 1:
            return
        if self._broken:
            raise PeerError("another process failed to save")
        number = next(self._arrivals)
        try:
            keys = distributed.exchange(f"{self._folder}/{number}/", key, timeout_ms)
        except Exception:
            self._broken = True
            raise
        if number and distributed.is_main_process():
            distributed.forget(f"{self._folder}/{number - 1}/")
        if len(set(keys.values())) > 1:
            self._broken = True
            raise PeerError("another process failed to save")

    def fail(self) -> None:
        """Reports a failure of this process to the processes that wait, or will wait, at the next barrier."""
        if not self._broken:
            with contextlib.suppress(Exception):
                self(key="failed", timeout_ms=distributed.WAIT_SECONDS * 1000)
            self._broken = True

    @property
    def broken(self) -> bool:
        """True in all processes of a job once one of them has failed."""
        return self._broken and jax.process_count() > 1

    @contextlib.contextmanager
    def replaces_orbax(self) -> Iterator[None]:
        """Uses this barrier for Orbax's calls inside the context; reports an exception to the others."""
        if jax.process_count() == 1:
            yield
            return
        original = multihost.sync_global_processes

        def wait(name: str, *, timeout: int | None = None, **_) -> None:
            self(key=name, timeout_ms=(timeout or distributed.WAIT_SECONDS) * 1000)

        multihost.sync_global_processes = wait
        try:
            yield
        except Exception:
            self.fail()
            raise
        finally:
            multihost.sync_global_processes = original


def align_operations() -> None:
    """Gives Orbax the same operation number in all processes; the numbers differ after a failure.

    Orbax identifies the signals of a save by this number.
    """
    own = int(OperationIdGenerator.get_current_operation_id())
    newest = max(map(int, distributed.gather(str(own)).values()))
    for _ in range(newest - own):
        OperationIdGenerator.next_operation_id()
