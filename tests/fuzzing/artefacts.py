"""What all targets of the fuzz are made of."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hypothesis.strategies import SearchStrategy

TEXT = "naïve 🙂 \u2028 <mask> ▁ x\n"


class Target(NamedTuple):
    """An artefact and its reader.

    Attributes:
      files: of the artefact, by their path in its folder.
      use: reads the artefact that lies in a folder. Raises what the command would see, and asserts what must
        hold when nothing is raised.
      content: what the files are replaced by; None: what damage makes of them.
      share: of the cases, beside those of others; less where a case takes long.
    """

    files: dict[str, bytes]
    use: Callable[[Path], None]
    content: SearchStrategy[bytes] | None = None
    share: float = 1.0


def real_texts(pattern: str = "json/decoder.py") -> list[str]:
    """Text that is on every machine, the standard library's, cut at blank lines; a difficult one in front."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8") for path in sorted(root.glob(pattern))]
    return [TEXT, *(block for text in texts for block in text.split("\n\n") if block.strip())]


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder, by its path there."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def jsonl(values) -> bytes:
    """Values as JSON lines."""
    return "".join(json.dumps(value) + "\n" for value in values).encode()
