"""Files of the buckets that hold documents between the passes of `prepare`.

Each worker process appends records to a file per bucket: the hash of a document, its split, its domain and
its text.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_HEADER = struct.Struct("<16s?HI")  # hash, held out, bytes of the domain, bytes of text
HASH_BYTES = 16


class Location(NamedTuple):
    """The position of a text in the file of a bucket."""

    file: str
    start: int
    size: int


class Record(NamedTuple):
    """A document in a bucket; `domain` is empty unless the domains of held-out documents are recorded."""

    digest: bytes
    held_out: bool
    domain: str
    text: bytes
    location: Location


def pack_record(digest: bytes, held_out: bool, text: bytes, domain: str = "") -> tuple[bytes, bytes, bytes]:
    """Returns the parts of the record of a document."""
    name = domain.encode("utf-8")
    return _HEADER.pack(digest, held_out, len(name), len(text)), name, text


def append_records(folder: Path, bucket: int, parts: Iterable[bytes]) -> None:
    """Appends records to the file of a bucket that belongs to this process."""
    with open(folder / f"{bucket:06d}-{os.getpid()}", "ab") as file:
        file.write(b"".join(parts))


def read_records(folder: Path, bucket: int) -> tuple[list[Record], int]:
    """Reads a bucket, sorted by hash and without duplicates.

    If one of several equal documents is held out, the held-out one is kept, so that it is not trained on. Of
    several held-out ones, the one with the first domain in alphabetical order is kept.

    Returns:
      The documents without those of `drop_documents`, and the number of duplicates.
    """
    records = []
    for path in folder.glob(f"{bucket:06d}-*"):
        data, position = path.read_bytes(), 0
        while position < len(data):
            digest, held_out, name_size, size = _HEADER.unpack_from(data, position)
            start = position + _HEADER.size + name_size
            domain = data[start - name_size : start].decode("utf-8")
            position = start + size
            location = Location(path.name, start, size)
            records.append(Record(digest, held_out, domain, data[start:position], location))
    records.sort(key=lambda record: (record.digest, not record.held_out, record.domain))
    unique = [next(group) for _, group in itertools.groupby(records, key=lambda record: record.digest)]
    dropped = set(_dropped(folder, bucket))
    return [record for record in unique if record.digest not in dropped], len(records) - len(unique)


def read_bucket(folder: Path, bucket: int) -> tuple[list[tuple[bool, bytes]], int]:
    """Reads a bucket like `read_records`; its documents are tuples (held out, text)."""
    records, duplicates = read_records(folder, bucket)
    return [(record.held_out, record.text) for record in records], duplicates


def read_text(folder: Path, location: Location) -> bytes:
    """Reads one text from the file of a bucket."""
    with open(folder / location.file, "rb") as file:
        file.seek(location.start)
        return file.read(location.size)


def drop_documents(folder: Path, bucket: int, digests: Sequence[bytes]) -> None:
    """Removes documents from a bucket, given their hashes."""
    with open(_drop_file(folder, bucket), "ab") as file:
        file.write(b"".join(digests))


def _dropped(folder: Path, bucket: int) -> Iterator[bytes]:
    path = _drop_file(folder, bucket)
    content = path.read_bytes() if path.exists() else b""
    for start in range(0, len(content), HASH_BYTES):
        yield content[start : start + HASH_BYTES]


def _drop_file(folder: Path, bucket: int) -> Path:
    return folder / f"dropped-{bucket:06d}"
