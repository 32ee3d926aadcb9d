"""Documents from the files people have: JSON lines, text, columns, token ids, and a built-in corpus.

Reading is split in two so that it parallelises: `read_blocks` yields blocks of undecoded lines from one
file after another, `parse` turns one line into text or into the kind of its fault. The first is cheap and
runs in the main process, the second runs in workers.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import gzip
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dualsm.data.columns import read_column
from dualsm.data.megatron import read_documents
from dualsm.data.tokenizer import Tokenizer
from dualsm.errors import UserError

PYTHON_STDLIB = "python-stdlib"
_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*_LINES, ".txt", ".parquet", ".arrow", ".bin")
FAULTS = ("bad_json", "no_text", "invalid_utf8", "empty_text", "too_long", "unknown_id")
_BLOCK_BYTES = 1 << 20
_ZSTD_PIECE = 128  # compressed bytes taken at once: 32 blocks at most, which unpack to 4 MiB
_LARGER_WHEN_UNPACKED = {".gz": 4, ".zst": 4, ".parquet": 3, ".bin": 2}  # rough ratios, for sizing only


@dataclasses.dataclass(frozen=True)
class Block:
    """A run of undecoded documents of one file.

    Attributes:
      path: the file.
      form: "jsonl" (each item is a line of JSON), "text" (each item is a document) or "ids" (each item is
        a document as int64 token ids).
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
      pattern: `python-stdlib`, or comma-separated paths and globs (`**` crosses folders). A folder must be
        one that the library `datasets` saved.

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
        is_folder = Path(part).is_dir()
        matches = _saved_dataset(part) if is_folder else sorted(glob.glob(part, recursive=True))
        matches = [path for path in matches if Path(path).is_file()]
        if not matches:
            raise UserError(f"--input: no file matches {part!r}")
        paths += matches
    if not paths:
        raise UserError("--input is empty; give files, globs or python-stdlib")
    for path in paths:
        if not path.endswith(SUFFIXES):
            raise UserError(f"--input: {path} is none of {', '.join(SUFFIXES)}")
    return paths


def _saved_dataset(folder: str) -> list[str]:
    """The files of a Hugging Face dataset saved with `save_to_disk`, in its own order."""
    if (Path(folder) / "dataset_dict.json").exists():
        raise UserError(f"--input: {folder} holds several splits; give the folder of one, as {folder}/train")
    try:
        state = json.loads((Path(folder) / "state.json").read_text())
        return [str(Path(folder) / Path(file["filename"]).name) for file in state["_data_files"]]
    except OSError as error:
        raise UserError(f"--input: {folder} is a folder; give its files, as in '{folder}/*.jsonl'") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--input: {folder}/state.json is damaged") from error


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
      text_key: column of the text in a .parquet or .arrow file.
      max_bytes: documents longer than this are passed over (as None).

    Raises:
      UserError: when the file cannot be read or its compression is broken, with its name.
    """
    try:
        if path.endswith((".parquet", ".arrow")):
            yield from _column_blocks(path, text_key, max_bytes)
        elif path.endswith(".bin"):
            yield from _id_blocks(path, max_bytes)
        elif path.endswith(_LINES):
            yield from _line_blocks(path, max_bytes)
        else:
            size = Path(path).stat().st_size
            item = Path(path).read_bytes() if size <= max_bytes else None
            yield Block(path, "text", 1, [item], size)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def parse(item: bytes | None, form: str, text_key: str, tokenizer: str = "") -> str:
    """Text of one undecoded document.

    Args:
      item, form: see `Block`.
      text_key: field of the text in JSON.
      tokenizer: file of the tokenizer that ids are of.

    Raises:
      Fault: when there is no text to be had.
      UserError: for ids without a tokenizer.
    """
    if item is None:
        raise Fault("too_long")
    try:
        text = item.decode("utf-8") if form != "ids" else _spell_out(item, tokenizer)
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
    with open(path, "rb", _BLOCK_BYTES) as raw, _decompressed(raw, path) as stream:
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
        return io.BufferedReader(_ZstdReader(raw), 1 << 18)
    return raw


class _ZstdReader(io.RawIOBase):
    """What zstandard frames hold, one after another; an end inside a frame is an error, as it is in gzip.

    zstandard's own file-like reader takes any end of the file for the end of the text.
    """

    def __init__(self, raw: io.BufferedReader):
        self._raw, self._piece, self._frame = raw, b"", None
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._text:
            self._piece = self._piece or self._raw.read(_ZSTD_PIECE)
            if not self._piece and self._frame is None:
                return 0
            if not self._piece:
                raise EOFError("the compressed file is cut short: it ends inside a frame")
            self._text = memoryview(self._unpack())
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def _unpack(self) -> bytes:
        """What the piece holds of the frame it belongs to; the frames after that stay in the piece."""
        import zstandard

        self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            text = self._frame.decompress(self._piece)
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        self._piece = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
        return text


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


def _column_blocks(path: str, text_key: str, max_bytes: int) -> Iterator[Block]:
    first = 1
    for items, consumed in read_column(path, text_key, max_bytes):
        yield Block(path, "text", first, items, consumed)
        first += len(items)


def _id_blocks(path: str, max_bytes: int) -> Iterator[Block]:
    """Blocks of documents as little-endian int64 ids; a document of n ids has at least about n bytes."""
    items: list[bytes | None] = []
    first, held = 1, 0
    for ids in read_documents(path, max_bytes):
        items.append(None if ids is None else ids.astype("<i8").tobytes())
        held += 0 if ids is None else len(ids)
        if held >= _BLOCK_BYTES:
            yield Block(path, "ids", first, items, 2 * held)  # about two bytes an id, for progress only
            first, held, items = first + len(items), 0, []
    yield Block(path, "ids", first, items, 2 * held)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    """The tokenizer that ids are spelled out with; loaded once in each worker."""
    return Tokenizer.load(path)


def _spell_out(ids: bytes, tokenizer: str) -> str:
    if not tokenizer:
        raise UserError("token ids mean nothing without their tokenizer: give it with --tokenizer=FILE")
    known = _tokenizer(tokenizer)
    try:
        return known.decode(known.from_own(np.frombuffer(ids, "<i8")))
    except IndexError as error:
        raise Fault("unknown_id") from error
