"""What people look at while they wait: progress bars, lines above them, tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm


def bar(**options) -> tqdm:
    """A progress bar on stderr; in a log file it is a line every half minute instead of a flicker."""
    interactive = sys.stderr.isatty()
    options = {"mininterval": 0.2 if interactive else 30, "dynamic_ncols": interactive} | options
    if not interactive:
        options |= {"ncols": 100, "maxinterval": 30, "ascii": True}
    return tqdm(file=sys.stderr, **options)


def say(text: str) -> None:
    """Prints a line to stdout without tearing a bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def warn(text: str) -> None:
    """Prints a line to stderr without tearing a bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


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
