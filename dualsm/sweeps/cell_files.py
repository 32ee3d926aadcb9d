"""Values in the JSON files of a cell's run directory."""

from __future__ import annotations

import json
import math
from typing import Any

from etils import epath

Record = dict[str, Any]


def read_object(path: epath.Path) -> dict:
    """Reads a file with a JSON object. Raises `ValueError` if it contains anything else."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: not an object")
    return content


def number(value) -> float | None:
    """Returns a finite number unchanged, and None for anything else."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None
