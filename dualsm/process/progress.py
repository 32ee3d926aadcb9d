"""Terminal output: progress bars, lines printed above them, tables."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm


def bar(**options) -> tqdm:
    """Returns a progress bar on stderr; outside a terminal it prints one line every 30 seconds."""
    interactive = sys.stderr.isatty()
    options = {"mininterval": 0.2 if interactive else 30, "dynamic_ncols": interactive} | options
    if not interactive:
        options |= {"ncols": 100, "maxinterval": 30, "ascii": True}
    return tqdm(file=sys.stderr, **options)


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


class LiveTable:
    """A table that is redrawn in place on a terminal.

    In a log file, a row is printed when its second column, the status, changes, and the table at the end.
    """

    def __init__(self, header: Sequence[str]):
        self._header, self._lines, self._status = list(header), [], {}
        self._live = sys.stdout.isatty()

    def show(self, rows: Sequence[Sequence[str]], final: bool = False) -> None:
        """Shows the current rows."""
        if self._live:
            lines = table(self._header, rows).splitlines()
            if lines == self._lines:
                return
            up = f"\033[{len(self._lines)}F" if self._lines else ""
            sys.stdout.write(up + "".join(f"\033[2K{line}\n" for line in lines))
            self._lines = lines
        elif final:
            sys.stdout.write(table(self._header, rows) + "\n")
        else:
            for name, status, *rest in rows:
                if status and self._status.get(name) != status:
                    sys.stdout.write("  ".join([name, status, *filter(None, rest)]) + "\n")
                self._status[name] = status
        sys.stdout.flush()


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
