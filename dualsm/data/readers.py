"""Documents from the files people have: .jsonl (plain, .gz, .zst), .txt, .parquet, and a built-in corpus.

Reading is split in two so that it parallelises: `read_blocks` yields blocks of undecoded lines from one
file after another, `parse` turns one line into text or into the kind of its fault. The first is cheap and
runs in the main process, the second runs in workers.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from dualsm.errors import UserError

PYTHON_STDLIB = "python-stdlib"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")
FAULTS = ("bad_json", "no_text", "invalid_utf8", "empty_text", "too_long")
_BLOCK_BYTES = 1 << 20
_LARGER_WHEN_UNPACKED = {".gz": 4, ".zst": 4, ".parquet": 3}  # rough ratios, for sizing only


@dataclasses.dataclass(frozen=True)
class Block:
    """A run of undecoded documents of one file.

    Attributes:
      path: the file.
      form: "jsonl" (each item is a line of JSON) or "text" (each item is a document).
      first: number of the first item in its file, counted from 1 (lines of .jsonl, rows of .parquet).
      items: the undecoded documents; None stands for one that was longer than allowed.
      consumed: bytes of the input this block accounts for, for progress.
    """

    path: str
    form: str
    first: int
    items: list[bytes | None]
    consumed: int


class Fault(ValueError):
    """A document that cannot be used; `kind` is one of `FAULTS`."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


def find_inputs(pattern: str) -> list[str]:
    """The files a pattern means, in a fixed order.

    Args:
      pattern: `python-stdlib`, or comma-separated paths and globs (`**` crosses folders).

    Raises:
      UserError: when a part of the pattern matches nothing, or a file of unknown kind.
    """
    if pattern == PYTHON_STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "__pycache__"}
        paths = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
        return [str(p) for p in sorted(paths) if p.stat().st_size > 0]
    paths = []
    for part in filter(None, pattern.split(",")):
        matches = [p for p in sorted(glob.glob(part, recursive=True)) if Path(p).is_file()]
        if not matches:
            raise UserError(f"--input: no file matches {part!r}")
        paths += matches
    if not paths:
        raise UserError("--input is empty; give files, globs or python-stdlib")
    for path in paths:
        if not path.endswith(SUFFIXES):
            raise UserError(f"--input: {path} is none of {', '.join(SUFFIXES)}")
    return paths


def input_bytes(paths: list[str]) -> list[int]:
    """Size of each file on disk."""
    return [Path(path).stat().st_size for path in paths]


def unpacked_bytes(paths: list[str]) -> int:
    """A rough total of the text inside the files, for choosing the number of shards."""
    return sum(Path(path).stat().st_size * _LARGER_WHEN_UNPACKED.get(Path(path).suffix, 1) for path in paths)


def read_blocks(path: str, text_key: str, max_bytes: int) -> Iterator[Block]:
    """Blocks of one file, bounded in memory whatever the size of the file.

    Args:
      path: the file; its suffix says how to read it.
      text_key: column of the text in a .parquet file.
      max_bytes: documents longer than this are passed over (as None).

    Raises:
      UserError: when the file cannot be read or its compression is broken, with its name.
    """
    try:
        if path.endswith(".parquet"):
            yield from _parquet_blocks(path, text_key, max_bytes)
        elif ".jsonl" in path:
            yield from _line_blocks(path, max_bytes)
        else:
            size = Path(path).stat().st_size
            item = Path(path).read_bytes() if size <= max_bytes else None
            yield Block(path, "text", 1, [item], size)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def parse(item: bytes | None, form: str, text_key: str) -> str:
    """Text of one undecoded document. Raises `Fault` when there is none to be had."""
    if item is None:
        raise Fault("too_long")
    try:
        text = item.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Fault("invalid_utf8") from error
    if form == "jsonl":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Fault("bad_json") from error
        text = value.get(text_key) if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise Fault("no_text")
        try:
            text.encode("utf-8")  # JSON can spell lone surrogates, which are no text
        except UnicodeEncodeError as error:
            raise Fault("invalid_utf8") from error
    if not text.strip():
        raise Fault("empty_text")
    return text


def _line_blocks(path: str, max_bytes: int) -> Iterator[Block]:
    """Blocks of lines; `consumed` counts compressed bytes."""
    with open(path, "rb") as raw, _decompressed(raw, path) as stream:
        number, position = 0, 0
        items: list[bytes | None] = []
        held = 0
        for line in _lines(stream, max_bytes):
            number += 1
            items.append(line)
            held += len(line or b"") + 64
            if held >= _BLOCK_BYTES:
                consumed, position = raw.tell() - position, raw.tell()
                yield Block(path, "jsonl", number - len(items) + 1, items, consumed)
                items, held = [], 0
        yield Block(path, "jsonl", number - len(items) + 1, items, raw.tell() - position)


def _decompressed(raw: io.BufferedReader, path: str):
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.endswith(".zst"):
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(_ZstdReader(reader), 1 << 18)
    return raw


class _ZstdReader(io.RawIOBase):
    """zstandard's reader with its own error turned into an OSError, as every other reader has it."""

    def __init__(self, reader):
        self._reader = reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        import zstandard

        try:
            return self._reader.readinto(buffer)
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error


def _lines(stream, max_bytes: int) -> Iterator[bytes | None]:
    """Non-blank lines of a binary stream; None for one that is too long, which is never held whole.

    Blank lines are yielded too (they count as faults), except a last empty one.
    """
    limit = max_bytes + 1
    while line := stream.readline(limit):
        if len(line) < limit or line.endswith(b"\n"):
            yield line
            continue
        while rest := stream.readline(_BLOCK_BYTES):
            if rest.endswith(b"\n"):
                break
        yield None


def _parquet_blocks(path: str, text_key: str, max_bytes: int) -> Iterator[Block]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install 'dualsm[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path} has no column {text_key!r} (it has {names}); see --text_key")
            size, rows = Path(path).stat().st_size, max(1, file.metadata.num_rows)
            first = 1
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                values = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
                items = [b"" if v is None else v if len(v) <= max_bytes else None for v in values]
                yield Block(path, "text", first, items, size * len(items) // rows)
                first += len(items)
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path}: {error}") from error
