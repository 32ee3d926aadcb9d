"""Documents from the files people have: JSON lines, text, columns, token ids, and a built-in corpus.

Reading is split in two so that it parallelises: `read_blocks` yields blocks of undecoded lines from one
file after another, `parse` turns one line into text or into the kind of its fault. The first is cheap and
runs in the main process, the second runs in workers.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dualsm.data import streams
from dualsm.data.columns import read_column
from dualsm.data.megatron import read_documents
from dualsm.data.text import likely_encoding, parse_json, without_bom
from dualsm.data.tokenizer import Tokenizer
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.process.errors import UserError

PYTHON_STDLIB = "python-stdlib"
_LINES = (".jsonl", ".ndjson", ".json")
_DIVIDED = (".train", ".dev", ".test")  # BabyLM's, whose files are of many documents
_TEXTS = (".txt", *_DIVIDED)
_COLUMNS = (".parquet", ".arrow")
SUFFIXES = (*_LINES, *_TEXTS, *_COLUMNS, ".bin")
FAULTS = ("bad_json", "no_text", "invalid_utf8", "empty_text", "too_long", "unknown_id")
_MOST_KEYS = 8  # of a JSON object, in an error
_LARGER_WHEN_UNPACKED = dict.fromkeys(streams.COMPRESSIONS, 4) | {".parquet": 3, ".bin": 2}  # roughly


@dataclasses.dataclass(frozen=True)
class Block:
    """A run of undecoded documents of one file.

    Attributes:
      path: the file.
      form: "jsonl" (each item is a line of JSON), "json" (each item is a JSON object), "text" (each item is a
        document) or "ids" (each item is a document as int64 token ids).
      first: number of the first item in its file, counted from 1 (lines of .jsonl, rows of .parquet).
      items: the undecoded documents; None stands for one that was longer than allowed.
      consumed: bytes of the input this block accounts for, for progress.
    """

    path: str
    form: str
    first: int
    items: list[bytes | None]
    consumed: int

    def place(self, index: int) -> str:
        """Returns the file and number of an item, for people."""
        return f"{self.path}, {'line' if self.form == 'jsonl' else 'document'} {self.first + index}"


class Fault(ValueError):
    """A document that cannot be used; `kind` is one of `FAULTS`, and its text says more."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


def find_inputs(pattern: str, flag: str = "--input") -> list[str]:
    """The files a pattern means, in a fixed order.

    Args:
      pattern: `python-stdlib`, or comma-separated paths and globs (`**` crosses folders). A folder must be
        one that the library `datasets` saved. A file that exists is not taken for a glob or a list.
      flag: that the pattern comes from, for errors.

    Raises:
      UserError: when a part of the pattern matches nothing, or a file of unknown kind.
    """
    if pattern == PYTHON_STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "__pycache__"}
        paths = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
        return [str(p) for p in sorted(paths) if p.stat().st_size > 0]
    is_one = os.path.exists(os.path.expanduser(pattern))
    paths = []
    for part in [pattern] if is_one else filter(None, pattern.split(",")):
        matches = [path for path in _matches(os.path.expanduser(part), flag) if os.path.isfile(path)]
        if not matches:
            raise UserError(f"{flag}: no file matches {part!r}; check the path, or quote the glob")
        paths += matches
    if not paths:
        raise UserError(f"{flag} is empty; give files, globs or python-stdlib")
    for path in paths:
        if _suffix(path) not in SUFFIXES:
            raise UserError(
                f"{flag}: {path} is none of {', '.join(SUFFIXES)}; text may be compressed too "
                f"({', '.join(streams.COMPRESSIONS)})"
            )
    return list(dict.fromkeys(paths))


def _matches(part: str, flag: str) -> list[str]:
    """A file or folder of that name, else what the glob matches; folders that exist are not globs."""
    if os.path.isdir(part):
        return _saved_dataset(part, flag)
    if os.path.exists(part):
        return [part]
    folder, names = "", part.split("/")
    while len(names) > 1 and os.path.isdir(f"{folder}{names[0]}/"):
        folder += f"{names.pop(0)}/"
    found = glob.glob("/".join(names), root_dir=folder or None, recursive=True)
    return [folder + name for name in sorted(found)]


def _suffix(path: str) -> str:
    """The end of a name that says how a file is read; compressed files other than text have none."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix not in streams.COMPRESSIONS:
        return suffix
    suffix = os.path.splitext(stem)[1]
    return suffix if suffix in (*_LINES, *_TEXTS) else ""


def _saved_dataset(folder: str, flag: str) -> list[str]:
    """The files of a Hugging Face dataset saved with `save_to_disk`, in its own order."""
    if (Path(folder) / "dataset_dict.json").exists():
        raise UserError(f"{flag}: {folder} holds several splits; give the folder of one, as {folder}/train")
    try:
        state = json.loads((Path(folder) / "state.json").read_text("utf-8"))
        return [str(Path(folder) / Path(file["filename"]).name) for file in state["_data_files"]]
    except OSError as error:
        raise UserError(f"{flag}: {folder} is a folder; give its files, as in '{folder}/*.jsonl'") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag}: {folder}/state.json is damaged") from error


def input_bytes(paths: list[str]) -> list[int]:
    """Size of each file on disk."""
    return [Path(path).stat().st_size for path in paths]


def unpacked_bytes(paths: list[str]) -> int:
    """A rough total of the text inside the files, for choosing the number of shards."""
    return sum(Path(path).stat().st_size * _LARGER_WHEN_UNPACKED.get(Path(path).suffix, 1) for path in paths)


def read_blocks(path: str, text_key: str, max_bytes: int, divide: bool = False) -> Iterator[Block]:
    """Blocks of one file, bounded in memory whatever the size of the file.

    Args:
      path: the file; its suffix says how to read it.
      text_key: column of the text in a .parquet or .arrow file.
      max_bytes: documents longer than this are passed over (as None).
      divide: cut a text file into documents at blank lines; otherwise it is one document.

    Raises:
      UserError: when the file cannot be read, its compression is broken or it is not UTF-8, with its name.
    """
    try:
        suffix = _suffix(path)
        if suffix in _COLUMNS:
            yield from _column_blocks(path, text_key, max_bytes)
        elif suffix == ".bin":
            yield from _id_blocks(path, max_bytes)
        else:
            yield from _text_blocks(path, max_bytes, divide or suffix in _DIVIDED)
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
        if form == "ids":
            text = _spell_out(item, tokenizer)
        elif form == "text":
            text = without_bom(item).decode("utf-8")
        else:
            text = _field(item, text_key)
            text.encode("utf-8")  # JSON can spell lone surrogates, which are no text
    except UnicodeDecodeError as error:
        raise Fault("invalid_utf8", likely_encoding(item)) from error
    except UnicodeEncodeError as error:
        detail = "lone surrogates" if item.isascii() else likely_encoding(item)
        raise Fault("invalid_utf8", detail) from error
    if not text.strip():
        raise Fault("empty_text")
    return text


def _field(item: bytes, text_key: str) -> str:
    """The text of a JSON object, with lone surrogates in place of what is not UTF-8."""
    try:
        value = parse_json(item)
    except ValueError as error:
        item.decode("utf-8")  # bytes that are not UTF-8 are the better reason
        raise Fault("bad_json") from error
    text = value.get(text_key) if isinstance(value, dict) else None
    if isinstance(text, str):
        return text
    if not isinstance(value, dict):
        raise Fault("no_text", "not a JSON object")
    keys = [repr(key[:40]) for key in value][:_MOST_KEYS] + ["..."] * (len(value) > _MOST_KEYS)
    found = "is not a string" if text_key in value else "is not there"
    raise Fault("no_text", f"--text_key={text_key} {found}; the keys are {', '.join(keys) or 'none'}")


def _text_blocks(path: str, max_bytes: int, divide: bool) -> Iterator[Block]:
    """Blocks of a text file; `consumed` counts compressed bytes."""
    with streams.open_text(path) as (raw, stream, head):
        if _suffix(path) not in _LINES:
            form = "text"
            items = streams.documents(stream, max_bytes) if divide else [_whole(stream, max_bytes)]
        elif streams.holds_objects(head):
            form, items = "json", streams.objects(stream, max_bytes)
        else:
            form, items = "jsonl", streams.lines(stream, max_bytes)
        number, position = 0, 0
        held: list[bytes | None] = []
        size = 0
        for item in items:
            number += 1
            held.append(item)
            size += len(item or b"") + 64
            if size >= streams.BLOCK_BYTES:
                consumed, position = raw.tell() - position, raw.tell()
                yield Block(path, form, number - len(held) + 1, held, consumed)
                held, size = [], 0
        yield Block(path, form, number - len(held) + 1, held, raw.tell() - position)


def _whole(stream, max_bytes: int) -> bytes | None:
    content = stream.read(max_bytes + 1)
    return content if len(content) <= max_bytes else None


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
        if held >= streams.BLOCK_BYTES:
            yield Block(path, "ids", first, items, 2 * held)  # about two bytes an id, for progress only
            first, held, items = first + len(items), 0, []
    yield Block(path, "ids", first, items, 2 * held)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    """The tokenizer that ids are spelled out with; loaded once in each worker."""
    return load_tokenizer(path)


def _spell_out(ids: bytes, tokenizer: str) -> str:
    if not tokenizer:
        raise UserError("token ids mean nothing without their tokenizer: give it with --tokenizer=FILE")
    known = _tokenizer(tokenizer)
    try:
        return known.decode(known.from_external_ids(np.frombuffer(ids, "<i8")))
    except IndexError as error:
        raise Fault("unknown_id") from error
