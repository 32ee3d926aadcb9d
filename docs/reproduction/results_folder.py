"""The command line of the scripts that collect results of `dualsm evaluate` in tables of this folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd


def collect(
    doc: str, pattern: str, tables: Mapping[Path, Callable[[Sequence[Path]], pd.DataFrame]], digits: str
) -> None:
    """Reads the folder that is named on the command line, and writes the tables.

    A folder without results is an error. Nothing is written if a table cannot be read.

    Args:
      doc: docstring of the script.
      pattern: names of the files with results, as a glob in the folder.
      tables: path of each table -> the function that returns it from the paths of these files, which are in
        alphabetical order.
      digits: format of the numbers.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the results; see protocol.md")
    folder = parser.parse_args().folder
    paths = sorted(folder.glob(pattern))
    if not paths:
        parser.error(f"{folder} has no files {pattern}")
    found = {path: read(paths) for path, read in tables.items()}
    for path, table in found.items():
        table.to_csv(path, index=False, float_format=digits)
