"""Wall-clock time between log lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple


class Interval(NamedTuple):
    """The time between two log lines.

    Attributes:
      steps: number of training steps.
      seconds: wall-clock time without validation.
      waiting: seconds in which the devices were idle because the next batch was not ready.
      saving: seconds in which saving a checkpoint blocked the loop.
    """

    steps: int
    seconds: float
    waiting: float
    saving: float


class Clock:
    """Divides the time of a run into contiguous intervals, which include the time to write log lines."""

    def __init__(self):
        self._start = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self.steps, self.waiting, self.saving, self.validating = 0, 0.0, 0.0, 0.0

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the time spent inside the context to the attribute `name`."""
        began = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - began)

    def interval(self) -> Interval:
        """Ends the current interval; the next one starts at the same moment."""
        end = time.perf_counter()
        seconds = max(end - self._start - self.validating, 1e-9)
        ended = Interval(self.steps, seconds, self.waiting, self.saving)
        self._start = end
        self._reset()
        return ended
