"""Cuts the text of the study: four training parts, and a dev and a test part of the held-out text.

python docs/reproduction/cut.py --train=text/train.jsonl.gz --valid=text/valid.jsonl --output=parts

A line has the fields `text` and `source`, where "#k/n" at the end of `source` is the piece of a longer unit.
All pieces of a unit are in the same part.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

TRAIN_BYTES = 4_000_000  # of each training part


def part_of(document: dict, salt: str, parts: int) -> int:
    """Returns the part of a document, from a hash of its unit."""
    unit = re.sub(r"#\d+/\d+$", "", document["source"])
    return int.from_bytes(hashlib.sha256((salt + unit).encode()).digest()[:8], "big") % parts


def lines(path: Path) -> Iterator[str]:
    """Yields the lines of a JSONL file, which may be compressed."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("train", "valid", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path, salt, names in ((arguments.train, "t", "ABCD"), (arguments.valid, "v", ("dev", "test"))):
        files = [(arguments.output / f"{name}.jsonl").open("w") for name in names]
        sizes = [0] * len(files)
        for line in lines(path):
            part = part_of(json.loads(line), salt, len(files))
            sizes[part] += len(line.encode())
            if salt == "v" or sizes[part] <= TRAIN_BYTES:
                files[part].write(line)
        for file in files:
            file.close()


if __name__ == "__main__":
    main()
