"""Work handed to processes, its results in order and only so far ahead as memory allows."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool

from dualsm.errors import UserError


class _ThisProcess(futures.Executor):
    """An executor without workers: it does what it is given at once."""

    def submit(self, function, /, *args) -> futures.Future:
        future = futures.Future()
        future.set_result(function(*args))
        return future


@contextlib.contextmanager
def pool_of(workers: int) -> Iterator[futures.Executor]:
    """An executor of so many processes; of 1 it is this process itself.

    Raises:
      UserError: when a worker was killed.
    """
    if workers == 1:
        yield _ThisProcess()
        return
    context = multiprocessing.get_context("spawn")
    try:
        with futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most often for want of memory; try fewer --workers"
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
