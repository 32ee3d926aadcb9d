"""Documents from JSON, text, Parquet, Arrow and Megatron-LM files.

Reading has two parts, so that it can run in parallel: `read_blocks` yields blocks of undecoded documents and
is cheap enough for the main process; `parse` decodes one document and runs in worker processes.
"""

from __future__ import annotations

import dataclasses
import functools
import posixpath
import zlib
from collections.abc import Iterator

import numpy as np

from dualsm.data import inputs, streams
from dualsm.data.columns import read_column
from dualsm.data.megatron import read_documents
from dualsm.data.text import likely_encoding, parse_json, without_bom
from dualsm.data.tokenizer import Tokenizer
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.process.errors import UserError
from dualsm.process.paths import local_copy

FAULTS = ("bad_json", "no_text", "invalid_utf8", "empty_text", "too_long", "unknown_id")
_MAX_KEYS = 8  # JSON keys listed in an error


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive undecoded documents of one file.

    Attributes:
      path: the file.
      form: "jsonl" (each item is a line of JSON), "json" (each item is a JSON object), "text" (each item is a
        document) or "ids" (each item is a document as int64 token ids).
      first: number of the first item in its file, counted from 1 (lines of .jsonl, rows of .parquet).
      items: the undecoded documents; None for documents longer than allowed.
      consumed: bytes of the file that the block represents, for progress bars.
    """

    path: str
    form: str
    first: int
    items: list[bytes | None]
    consumed: int

    def location(self, index: int) -> str:
        """Returns the file and number of an item, for messages."""
        return f"{self.path}, {'line' if self.form == 'jsonl' else 'document'} {self.first + index}"


class Fault(ValueError):
    """Raised for a document that cannot be used; `kind` is one of `FAULTS`."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


def read_blocks(path: str, text_key: str, max_bytes: int, divide: bool = False) -> Iterator[Block]:
    """Yields the blocks of a file, in bounded memory.

    Args:
      path: the file; its suffix determines the format.
      text_key: column of the text in a .parquet or .arrow file.
      max_bytes: longer documents are not read; their items are None.
      divide: split a text file into documents at blank lines; otherwise the file is one document.

    Raises:
      UserError: if the file cannot be read, its compression is damaged or it is not UTF-8.
    """
    try:
        suffix = inputs.file_suffix(path)
        if suffix in inputs.COLUMN_SUFFIXES:
            with local_copy(path) as copy:
                yield from _column_blocks(copy, text_key, max_bytes)
        elif suffix == ".bin":
            with local_copy(path, f"{posixpath.basename(path).removesuffix('.bin')}.idx") as copy:
                yield from _id_blocks(copy, max_bytes)
        else:
            yield from _text_blocks(path, max_bytes, divide or suffix in inputs.BABYLM_SUFFIXES)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def parse(item: bytes | None, form: str, text_key: str, tokenizer: str = "") -> str:
    """Returns the text of an undecoded document.

    Args:
      item, form: see `Block`.
      text_key: field of the text in JSON.
      tokenizer: tokenizer file that decodes token ids.

    Raises:
      Fault: if the document has no usable text.
      UserError: for token ids without a tokenizer.
    """
    if item is None:
        raise Fault("too_long")
    try:
        if form == "ids":
            text = _decode_ids(item, tokenizer)
        elif form == "text":
            text = without_bom(item).decode("utf-8")
        else:
            text = _json_field(item, text_key)
            text.encode("utf-8")  # raises for lone surrogates, which JSON can express
    except UnicodeDecodeError as error:
        raise Fault("invalid_utf8", likely_encoding(item)) from error
    except UnicodeEncodeError as error:
        detail = "lone surrogates" if item.isascii() else likely_encoding(item)
        raise Fault("invalid_utf8", detail) from error
    if not text.strip():
        raise Fault("empty_text")
    return text


def _json_field(item: bytes, text_key: str) -> str:
    """Returns the text of a JSON object, with invalid UTF-8 as lone surrogates."""
    try:
        value = parse_json(item)
    except ValueError as error:
        item.decode("utf-8")  # invalid UTF-8 is the more useful error
        raise Fault("bad_json") from error
    text = value.get(text_key) if isinstance(value, dict) else None
    if isinstance(text, str):
        return text
    if not isinstance(value, dict):
        raise Fault("no_text", "not a JSON object")
    keys = [repr(key[:40]) for key in value][:_MAX_KEYS] + ["..."] * (len(value) > _MAX_KEYS)
    problem = "is not a string" if text_key in value else "does not exist"
    raise Fault("no_text", f"--text_key={text_key} {problem}; the keys are {', '.join(keys) or 'none'}")


def _text_blocks(path: str, max_bytes: int, divide: bool) -> Iterator[Block]:
    """Yields the blocks of a text or JSON file; `consumed` counts compressed bytes."""
    with streams.open_text(path) as (raw, stream, head):
        if inputs.file_suffix(path) not in inputs.JSON_SUFFIXES:
            form = "text"
            items = streams.documents(stream, max_bytes) if divide else [_read_all(stream, max_bytes)]
        elif streams.holds_objects(head):
            form, items = "json", streams.objects(stream, max_bytes)
        else:
            form, items = "jsonl", streams.lines(stream, max_bytes)
        count, position = 0, 0
        buffered: list[bytes | None] = []
        size = 0
        for item in items:
            count += 1
            buffered.append(item)
            size += len(item or b"") + 64
            if size >= streams.BLOCK_BYTES:
                consumed, position = raw.tell() - position, raw.tell()
                yield Block(path, form, count - len(buffered) + 1, buffered, consumed)
                buffered, size = [], 0
        yield Block(path, form, count - len(buffered) + 1, buffered, raw.tell() - position)


def _read_all(stream, max_bytes: int) -> bytes | None:
    content = stream.read(max_bytes + 1)
    return content if len(content) <= max_bytes else None


def _column_blocks(path: str, text_key: str, max_bytes: int) -> Iterator[Block]:
    first = 1
    for items, consumed in read_column(path, text_key, max_bytes):
        yield Block(path, "text", first, items, consumed)
        first += len(items)


def _id_blocks(path: str, max_bytes: int) -> Iterator[Block]:
    """Yields blocks of documents as little-endian int64 ids, at most `max_bytes` ids per document."""
    items: list[bytes | None] = []
    first, num_ids = 1, 0
    for ids in read_documents(path, max_bytes):
        items.append(None if ids is None else ids.astype("<i8").tobytes())
        num_ids += 0 if ids is None else len(ids)
        if num_ids >= streams.BLOCK_BYTES:
            yield Block(path, "ids", first, items, 2 * num_ids)  # about two bytes per id, for progress only
            first, num_ids, items = first + len(items), 0, []
    yield Block(path, "ids", first, items, 2 * num_ids)


@functools.lru_cache(maxsize=1)
def _cached_tokenizer(path: str) -> Tokenizer:
    """Loads the tokenizer of token ids once per worker process."""
    return load_tokenizer(path)


def _decode_ids(ids: bytes, tokenizer: str) -> str:
    if not tokenizer:
        raise UserError("token ids need the tokenizer that produced them; pass --tokenizer=FILE")
    loaded = _cached_tokenizer(tokenizer)
    try:
        return loaded.decode(loaded.from_external_ids(np.frombuffer(ids, "<i8")))
    except IndexError as error:
        raise Fault("unknown_id") from error
