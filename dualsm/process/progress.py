"""Terminal output: progress bars, lines printed above them, tables."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text
from tqdm import tqdm

_LOG_SECONDS = 30  # between two lines of a progress bar in a log


def bar(**options) -> tqdm:
    """Returns a progress bar on stderr; outside a terminal it prints a line every 30 seconds."""
    if sys.stderr.isatty():
        return tqdm(file=sys.stderr, **{"mininterval": 0.2, "dynamic_ncols": True} | options)
    log = {"mininterval": _LOG_SECONDS, "maxinterval": _LOG_SECONDS, "ncols": 100, "ascii": True}
    return tqdm(file=_LogLines(), **log | options)


class _LogLines:
    """File that writes the states of a progress bar to stderr as lines, without control characters."""

    def __init__(self):
        self._last = time.monotonic()

    def write(self, text: str) -> None:
        if text.strip() and time.monotonic() - self._last >= _LOG_SECONDS:
            self._last = time.monotonic()
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def escape_unprintable() -> None:
    """Makes stdout and stderr escape characters that their encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints a line to stdout, above any progress bar."""
    with _ignore_closed_terminal():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def warn(text: str) -> None:
    """Prints a warning to stderr, above any progress bar."""
    with _ignore_closed_terminal():
        tqdm.write(f"warning: {text}", file=sys.stderr)


def drop_terminal() -> None:
    """Redirects stdout and stderr to /dev/null where they are terminals."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode):  # `isatty` is false for a closed terminal
                os.dup2(devnull, number)
    os.close(devnull)


@contextlib.contextmanager
def _ignore_closed_terminal() -> Iterator[None]:
    """Ignores the EIO error of writing to a closed terminal, as tqdm does for progress bars."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        drop_terminal()


class LiveText:
    """Context manager of a text that is redrawn in place on a terminal, cropped to its last lines."""

    def __init__(self):
        console = Console(file=sys.stdout, force_terminal=True, highlight=False)
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveText:
        self._live.start()
        return self

    def __exit__(self, *_) -> None:
        """Erases the text."""
        with _ignore_closed_terminal():
            self._live.stop()

    def draw(self, text: str) -> None:
        console = self._live.console
        lines = Text(text, overflow="fold").wrap(console, console.width)
        with _ignore_closed_terminal():
            self._live.update(Text("\n").join(lines[1 - console.height :]), refresh=True)


class StatusTable:
    """Context manager of a table that is redrawn in place on a terminal.

    Without a terminal, a row is printed when its status (the second column) changes. The final table is
    printed in both cases.
    """

    def __init__(self, header: Sequence[str]):
        self._header, self._rows, self._status = list(header), [], {}
        self._live = LiveText() if sys.stdout.isatty() else None

    def __enter__(self) -> StatusTable:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self._live:
            self._live.__exit__(*error)
        say(table(self._header, self._rows))

    def show(self, rows: Sequence[Sequence[str]]) -> None:
        """Shows the current rows."""
        self._rows = rows
        if self._live:
            self._live.draw(table(self._header, rows))
            return
        for name, status, *rest in rows:
            if status and self._status.get(name) != status:
                say("  ".join([name, status, *filter(None, rest)]))
            self._status[name] = status


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table as text; the first column is left-aligned, the others right-aligned."""
    lines = [list(map(str, line)) for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
