"""What people look at while they wait: progress bars, lines above them, tables."""

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
    """A progress bar on stderr; in a log file it is a line every half minute instead of a flicker."""
    interactive = sys.stderr.isatty()
    options = {"mininterval": 0.2 if interactive else 30, "dynamic_ncols": interactive} | options
    if not interactive:
        options |= {"ncols": 100, "maxinterval": 30, "ascii": True}
    return tqdm(file=sys.stderr, **options)


def escape_unprintable() -> None:
    """Makes stdout and stderr escape the characters that their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints a line to stdout without tearing a bar."""
    with _outliving_terminal():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def warn(text: str) -> None:
    """Prints a line to stderr without tearing a bar."""
    with _outliving_terminal():
        tqdm.write(f"warning: {text}", file=sys.stderr)


def drop_terminal() -> None:
    """Sends what goes to a terminal on stdout or stderr nowhere from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode):  # `isatty` denies a terminal that is gone
                os.dup2(nowhere, number)
    os.close(nowhere)


@contextlib.contextmanager
def _outliving_terminal() -> Iterator[None]:
    """Goes on without the terminal when it is gone and writing fails with EIO, as tqdm does for bars."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        drop_terminal()


class Board:
    """A table that is redrawn in place on a terminal; in a log file a line is printed when its second
    column, the status, changes, and the whole table at the end."""

    def __init__(self, header: Sequence[str]):
        self._header, self._lines, self._status = list(header), [], {}
        self._live = sys.stdout.isatty()

    def show(self, rows: Sequence[Sequence[str]], final: bool = False) -> None:
        """Shows the rows as they are now."""
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
    """Text in columns: the first flush left, the others flush right."""
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
