"""The command line of the scripts that collect results of `dualsm evaluate` in a table of this folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd


def collect(
    doc: str, pattern: str, read: Callable[[Iterable[Path]], pd.DataFrame], table: Path, digits: str
) -> pd.DataFrame:
    """Reads the folder that is named on the command line, and writes the table.

    A folder without results is an error, and the table is left as it is.

    Args:
      doc: docstring of the script.
      pattern: names of the files with results, as a glob in the folder.
      read: returns the table from the paths of these files, in alphabetical order.
      table: path of the table.
      digits: format of its numbers.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the results; see protocol.md")
    folder = parser.parse_args().folder
    paths = sorted(folder.glob(pattern))
    if not paths:
        parser.error(f"{folder} has no files {pattern}")
    found = read(paths)
    found.to_csv(table, index=False, float_format=digits)
    return found
