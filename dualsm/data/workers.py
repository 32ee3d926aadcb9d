"""Pools of worker processes, with results in order and a bounded number of jobs in memory."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import multiprocessing.context
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool

from dualsm.process.errors import UserError


class _InlineExecutor(futures.Executor):
    """An executor without workers: `submit` calls the function."""

    def submit(self, function, /, *args) -> futures.Future:
        future = futures.Future()
        future.set_result(function(*args))
        return future


class _SpawnContext(multiprocessing.context.SpawnContext):
    """Spawns workers and keeps them, so that their exit codes can be read."""

    def __init__(self):
        self.started: list[multiprocessing.Process] = []

    def Process(self, *args, **kwargs):  # noqa: N802 (overrides)
        self.started.append(super().Process(*args, **kwargs))
        return self.started[-1]


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[futures.Executor]:
    """Yields an executor with the given number of processes; 1 runs all jobs in this process.

    Raises:
      UserError: if a worker was killed or did not start.
    """
    if workers == 1:
        yield _InlineExecutor()
        return
    context = _SpawnContext()
    try:
        with futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield pool
    except BrokenProcessPool as error:
        status = max((process.exitcode or 0 for process in context.started), default=0)
        if status > 0:  # the worker was not killed; spawned workers import the main module
            raise UserError(
                f"a worker process exited with status {status} at startup; a script must make this call "
                'under `if __name__ == "__main__":`, or with workers=1'
            ) from error
        raise UserError(
            "a worker process was killed, usually because the machine ran out of memory; "
            "use fewer processes (--workers)"
        ) from error


def map_in_order(pool: futures.Executor, function, jobs, lookahead: int) -> Iterator:
    """Yields the results of `function` over `jobs` in order, with at most `lookahead` jobs in memory."""
    pending: collections.deque[futures.Future] = collections.deque()
    try:
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) >= lookahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
