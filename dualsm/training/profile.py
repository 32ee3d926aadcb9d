"""Profiling of a window of steps, for TensorBoard and XProf."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax
from etils import epath

from dualsm.process import distributed
from dualsm.process.errors import UserError
from dualsm.process.paths import is_remote, upload, user_path
from dualsm.process.progress import say, warn

FOLDER = "profile"


class Window(NamedTuple):
    """Steps `first` to `last`, both included."""

    first: int
    last: int


def parse_window(text: str) -> Window:
    """Parses "FIRST:LAST"; raises `UserError` if the text is not a window."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    window = Window(*map(int, match.groups())) if match else None
    if window is None or not 2 <= window.first <= window.last:
        raise UserError(
            f"--profile={text} must be FIRST:LAST, two steps with 2 <= FIRST <= LAST (step 1 compiles)"
        )
    return window


@contextlib.contextmanager
def profiled(window: Window | None, workdir: epath.PathLike) -> Iterator[Profiler]:
    """Yields the profiler of a run; writes its trace at the end of the context. Only process 0 profiles.

    Args:
      window: steps to profile; None: none.
      workdir: the run directory; the trace is written to `profile/` in it.
    """
    folder = user_path(workdir) / FOLDER
    profiler = Profiler(window if distributed.is_main_process() else None, folder)
    try:
        yield profiler
    finally:
        profiler.end()
    if profiler.window is None:
        return
    if profiler.traced:
        say(f"profile of steps {window.first} to {window.last} in {folder}")
    else:
        warn(f"--profile={window.first}:{window.last}: the run did not train these steps")


class Profiler:
    """Traces the steps of a window.

    The trace starts after the dispatch of the step before the window and ends after the dispatch of the step
    after the window. Because devices run behind the host, the trace contains every step of the window.

    Attributes:
      window: steps to trace; None: none.
      traced: True once the trace has started.
    """

    def __init__(self, window: Window | None, folder: epath.Path):
        self.window, self._folder = window, folder
        self._running = False
        self.traced = False

    def after_step(self, step: int) -> None:
        """Starts or ends the trace; call it after the dispatch of each step."""
        if self.window is None:
            return
        if self._running and step > self.window.last:
            self.end()
        elif not self.traced and self.window.first - 1 <= step < self.window.last:
            # JAX writes traces to local folders only.
            self._written = tempfile.mkdtemp(prefix="dualsm-") if is_remote(self._folder) else self._folder
            jax.profiler.start_trace(self._written)
            self._running = self.traced = True

    def end(self) -> None:
        """Writes the trace if it is running."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
            if is_remote(self._folder):
                upload(self._written, self._folder)
                shutil.rmtree(self._written)
        except Exception as error:  # a full disk raises various errors; the run continues
            warn(f"the profile could not be written: {error}")
