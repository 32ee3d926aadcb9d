"""Profiles of some steps of a run, for TensorBoard and XProf."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from etils import epath

from dualsm.process import distributed
from dualsm.process.errors import UserError
from dualsm.process.progress import say, warn

FOLDER = "profile"


class Window(NamedTuple):
    """Steps `first` to `last`, both included."""

    first: int
    last: int


def parse_window(text: str) -> Window:
    """The window in "FIRST:LAST". Raises `UserError` when it is none."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    window = Window(*map(int, match.groups())) if match else None
    if window is None or not 2 <= window.first <= window.last:
        raise UserError(
            f"--profile={text} must be FIRST:LAST, two steps with 2 <= FIRST <= LAST (step 1 compiles)"
        )
    return window


@contextlib.contextmanager
def profiled(
    stop: Callable[[int], bool], window: Window | None, workdir: epath.PathLike
) -> Iterator[Callable[[int], bool]]:
    """`stop`, which a run asks after every step, made to trace the steps of a window on the way.

    The trace begins while the step before the window ends, and ends after the step behind it was begun:
    what is traced is whole, although the devices work while the host is ahead. Only process 0 traces.

    Args:
      stop: as `train` takes it.
      window: None traces nothing.
      workdir: of the run; the trace is written to `profile/` in it.
    """
    if window is None or not distributed.is_main_process():
        yield stop
        return
    folder = epath.Path(workdir) / FOLDER
    trace = _Trace(window, folder)

    def stop_and_trace(step: int) -> bool:
        trace.after(step)
        return stop(step)

    try:
        yield stop_and_trace
    finally:
        trace.end()
    if trace.seen:
        say(f"profile of steps {window.first} to {window.last} in {folder}")
    else:
        warn(f"--profile={window.first}:{window.last}: the run did not come by these steps")


class _Trace:
    """One trace, begun and ended by the steps that a run has made."""

    def __init__(self, window: Window, folder: epath.Path):
        self._window, self._folder = window, folder
        self._running = False
        self.seen = False

    def after(self, step: int) -> None:
        """Is called after every step."""
        if self._running and step > self._window.last:
            self.end()
        elif not self.seen and self._window.first - 1 <= step < self._window.last:
            jax.profiler.start_trace(self._folder)
            self._running = self.seen = True

    def end(self) -> None:
        """Writes the trace, if there is one."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # whatever a full disk makes the profiler raise; the run goes on
            warn(f"the profile could not be written: {error}")
