"""Fuzzing targets, and text for them."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hypothesis.strategies import SearchStrategy

TEXT = "naïve 🙂 \u2028 <mask> ▁ x\n"


class Target(NamedTuple):
    """Files and the function that reads them.

    Attributes:
      files: path in the folder -> content.
      use: reads the files in a folder. Raises the errors that a command would raise, and asserts invariants
        of the result.
      content: strategy for the content of a file; None: damaged versions of the file.
      share: relative number of cases; lower for slow targets.
    """

    files: dict[str, bytes]
    use: Callable[[Path], None]
    content: SearchStrategy[bytes] | None = None
    share: float = 1.0


def real_texts(pattern: str = "json/decoder.py") -> list[str]:
    """Returns text of the standard library, split at blank lines, after one difficult text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8") for path in sorted(root.glob(pattern))]
    return [TEXT, *(block for text in texts for block in text.split("\n\n") if block.strip())]


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns path in the folder -> content, for every file in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def jsonl(values) -> bytes:
    """Returns values as JSON lines."""
    return "".join(json.dumps(value) + "\n" for value in values).encode()
