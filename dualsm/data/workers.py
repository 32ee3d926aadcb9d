"""Work handed to processes, its results in order and only so far ahead as memory allows."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import multiprocessing.context
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool

from dualsm.process.errors import UserError


class _ThisProcess(futures.Executor):
    """An executor without workers: it does what it is given at once."""

    def submit(self, function, /, *args) -> futures.Future:
        future = futures.Future()
        future.set_result(function(*args))
        return future


class _Spawn(multiprocessing.context.SpawnContext):
    """Starts workers as "spawn" does, and remembers them."""

    def __init__(self):
        self.started: list[multiprocessing.Process] = []

    def Process(self, *args, **kwargs):  # noqa: N802 (overrides)
        self.started.append(super().Process(*args, **kwargs))
        return self.started[-1]


@contextlib.contextmanager
def pool_of(workers: int) -> Iterator[futures.Executor]:
    """An executor of so many processes; of 1 it is this process itself.

    Raises:
      UserError: when a worker was killed, or could not start.
    """
    if workers == 1:
        yield _ThisProcess()
        return
    context = _Spawn()
    try:
        with futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield pool
    except BrokenProcessPool as error:
        status = max((process.exitcode or 0 for process in context.started), default=0)
        if status > 0:  # it ended by itself: workers import the program that was started
            raise UserError(
                f"a worker process ended with status {status} before its work; a script must make this call "
                'under `if __name__ == "__main__":`, or with workers=1'
            ) from error
        raise UserError(
            "a worker process was killed, most often because memory ran out; try fewer --workers"
        ) from error


def in_order(pool, function, jobs, ahead: int) -> Iterator:
    """Results of `function` over `jobs` in order, with at most `ahead` jobs in memory."""
    waiting: collections.deque[futures.Future] = collections.deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
