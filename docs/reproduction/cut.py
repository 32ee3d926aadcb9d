"""Cuts the text of the study: four training parts, and a dev and a test part of the held-out text.

python docs/reproduction/cut.py --train=text/train.jsonl.gz --valid=text/valid.jsonl --output=parts

A line has the fields `text` and `source`, where "#k/n" at the end of `source` is the piece of a longer unit.
All pieces of a unit are in the same part. The fields `domain` and `unit` (its domain and its number in the
part) are added. The composition of each part is printed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TRAIN_BYTES = 4_000_000  # of each training part
# First part of `source` -> domain.
DOMAINS = {
    "standardebooks": "books",
    "openstax": "textbooks",
    "GSA": "web",
    "18F": "web",
    "nltk_data": "speeches",
}


def unit_of(document: dict) -> str:
    """Returns the chapter, article or speech that a document is a piece of."""
    return re.sub(r"#\d+/\d+$", "", document["source"])


def part_of(unit: str, salt: str, parts: int) -> int:
    """Returns the part of a unit, from a hash of its name."""
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
    for name in ("train", "valid"):
        if not (path := getattr(arguments, name)).is_file():
            parser.error(f"--{name}: {path} is not a file")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path, salt, names in ((arguments.train, "t", "ABCD"), (arguments.valid, "v", ("dev", "test"))):
        files = [(arguments.output / f"{name}.jsonl").open("w") for name in names]
        sizes = [0] * len(files)
        units: list[dict[str, int]] = [{} for _ in files]
        documents: list[Counter] = [Counter() for _ in files]
        for line in lines(path):
            document = json.loads(line)
            unit, domain = unit_of(document), DOMAINS[document["source"].partition("/")[0]]
            part = part_of(unit, salt, len(files))
            sizes[part] += len(line.encode())
            if salt == "v" or sizes[part] <= TRAIN_BYTES:
                number = units[part].setdefault(unit, len(units[part]))
                added = {"domain": domain, "unit": f"{domain} {number}"}
                files[part].write(json.dumps(document | added) + "\n")
                documents[part][domain] += 1
        for file, name, found, counts in zip(files, names, units, documents, strict=True):
            file.close()
            domains = ", ".join(f"{counts[domain]} {domain}" for domain in dict.fromkeys(DOMAINS.values()))
            print(f"{name}: {counts.total()} documents of {len(found)} units: {domains}")


if __name__ == "__main__":
    main()
