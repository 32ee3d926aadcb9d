"""Reads the CSV tables that come with dualsm as named tuples."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TypeVar, get_type_hints

Row = TypeVar("Row")  # a named tuple


def read_rows(path: Path, row: type[Row]) -> list[Row]:
    """Returns the rows of a table; its columns are the fields of `row`, converted to their types."""
    types = get_type_hints(row)
    with path.open(newline="") as file:
        return [
            row(**{name: types[name](text) for name, text in record.items()})
            for record in csv.DictReader(file)
        ]
