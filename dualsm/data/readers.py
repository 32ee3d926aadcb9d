"""Documents from JSON, text, CSV, Parquet, Arrow and Megatron-LM files.

Reading has two parts, so that it can run in parallel: `read_blocks` yields blocks of undecoded documents and
is cheap enough for the main process; `parse` decodes one document and runs in worker processes.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from dualsm.data import inputs, json_objects, streams
from dualsm.data.columns import read_columns
from dualsm.data.delimited import DELIMITERS, read_rows
from dualsm.data.domains import FILE_DOMAIN, Labeled, domain_name, file_domain, json_domain
from dualsm.data.faults import Fault
from dualsm.data.fields import json_text
from dualsm.data.megatron import read_documents
from dualsm.data.text import likely_encoding, parse_json, without_bom
from dualsm.data.tokenizer import Tokenizer
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.process.errors import BucketError, UserError
from dualsm.process.urls import file_name, local_input, random_access

Item = bytes | Labeled | None | Fault


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive undecoded documents of one file.

    Attributes:
      path: the file.
      form: "jsonl" (each item is a line of JSON), "json" (each item is a JSON object), "text" (each item is a
        document) or "ids" (each item is a document as int64 token ids).
      first: number of the first item in its file, counted from 1 (lines of .jsonl, rows of .parquet).
      items: the undecoded documents, with their domains if they are read from columns; None for documents
        longer than allowed, and the fault of documents that cannot be used.
      consumed: bytes of the file that the block represents, for progress bars.
    """

    path: str
    form: str
    first: int
    items: list[Item]
    consumed: int

    def location(self, index: int) -> str:
        """Returns the file and number of an item, for messages."""
        return f"{self.path}, {'line' if self.form == 'jsonl' else 'document'} {self.first + index}"


def read_blocks(
    path: str,
    text_key: str,
    max_bytes: int,
    divide: bool = False,
    file_format: str = "auto",
    split: str = "auto",
    domain_key: str = "",
) -> Iterator[Block]:
    """Yields the blocks of a file, in bounded memory.

    Args:
      path: the file.
      text_key: columns of the text in a .csv, .tsv, .parquet or .arrow file.
      max_bytes: longer documents are not read; their items are None, or faults in JSON. The limit is on the
        bytes of the text, of the line or object in JSON, and on the number of ids in a .bin file.
      divide: with `split="auto"`, merge the paragraphs of a text file into documents, as is always done for
        files with a suffix in `inputs.BABYLM_SUFFIXES`; otherwise the file is one document.
      file_format: one of `inputs.FORMATS`; "auto": the suffix determines the format.
      split: one of `streams.SPLITS`, the documents of a text file.
      domain_key: column of the domain in a .csv, .tsv, .parquet or .arrow file.

    Raises:
      UserError: if the file cannot be read, its compression is damaged or it is not UTF-8.
      BucketError: if the server of a URL does not answer.
    """
    column = "" if domain_key == FILE_DOMAIN else domain_key
    try:
        kind = inputs.format_of(path, file_format)
        if kind == "columns":
            with random_access(path) as file:
                yield from _column_blocks(file, path, text_key, max_bytes, column)
        elif kind == "ids":
            with local_input(path, f"{file_name(path).removesuffix('.bin')}.idx") as copy:
                yield from _id_blocks(copy, path, max_bytes)
        else:
            if split == "auto":
                divide |= inputs.file_suffix(path) in inputs.BABYLM_SUFFIXES
                split = "paragraphs" if divide else "file"
            yield from _text_blocks(path, kind, split, text_key, max_bytes, column)
    except BucketError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def is_blank(item: Item, form: str) -> bool:
    """Returns True for a blank line between JSON lines, which is not a document."""
    return form == "jsonl" and isinstance(item, bytes) and streams.is_blank(item)


def parse(item: Item, form: str, text_key: str, tokenizer: str = "", fields: set[str] | None = None) -> str:
    """Returns the text of an undecoded document.

    Args:
      item, form: see `Block`.
      text_key: fields of the text in JSON.
      tokenizer: tokenizer file that decodes token ids.
      fields: the names in `text_key` that exist in a JSON document are added to it.

    Raises:
      Fault: if the document has no usable text.
      UserError: for token ids without a tokenizer.
    """
    if isinstance(item, Labeled):
        item = item.text
    if item is None:
        raise Fault("too_long")
    if isinstance(item, Fault):
        raise item
    try:
        if form == "ids":
            text = _decode_ids(item, tokenizer)
        elif form == "text":
            text = without_bom(item).decode("utf-8")
        else:
            text = _json_field(item, text_key, fields)
            text.encode("utf-8")  # raises for lone surrogates, which JSON can express
    except UnicodeDecodeError as error:
        raise Fault("invalid_utf8", likely_encoding(item)) from error
    except UnicodeEncodeError as error:
        detail = "lone surrogates" if item.isascii() else likely_encoding(item)
        raise Fault("invalid_utf8", detail) from error
    if not text.strip():
        raise Fault("empty_text")
    return text


def parse_domain(block: Block, index: int, domain_key: str) -> str:
    """Returns the domain of a usable document of a block.

    Args:
      block: the block, which was read with `domain_key`.
      index: index of the document in the block.
      domain_key: name of the field or column, or `FILE_DOMAIN`.

    Raises:
      UserError: if the value cannot be a domain.
    """
    item = block.items[index]
    try:
        if domain_key == FILE_DOMAIN:
            return file_domain(block.path)
        if isinstance(item, Labeled):
            return domain_name(item.domain)
        return json_domain(item, domain_key)
    except ValueError as error:
        raise UserError(f"{block.location(index)}: --domain_key={domain_key} {error}") from error


def _json_field(item: bytes, text_key: str, fields: set[str] | None) -> str:
    """Returns the text of a JSON object, with invalid UTF-8 as lone surrogates."""
    try:
        value = parse_json(item)
    except ValueError as error:
        documents = json_objects.count_objects(item)
        try:
            item.decode("utf-8")
        except UnicodeDecodeError:  # the more useful error
            raise Fault("invalid_utf8", likely_encoding(item), documents) from error
        raise Fault("bad_json", documents=documents) from error
    return json_text(value, text_key, fields)


def _text_blocks(
    path: str, kind: str, split: str, text_key: str, max_bytes: int, domain_key: str
) -> Iterator[Block]:
    """Yields the blocks of a text, JSON or CSV file; `consumed` counts compressed bytes."""
    with streams.open_text(path) as (raw, stream, head):
        items: Iterator[Item]
        in_lines = kind in DELIMITERS or (kind == "text" and split != "file")
        if in_lines and streams.ends_lines_by_cr(head):
            raise UserError(f"{path} ends its lines with CR alone; convert them to LF, for example with tr")
        if kind in DELIMITERS:
            rows = read_rows(stream, path, DELIMITERS[kind], text_key, max_bytes, domain_key)
            form, items = "text", rows
        elif kind == "text":
            form, items = "text", streams.SPLITS[split](stream, max_bytes)
        elif json_objects.first_value(head) not in (b"", b"{", b"]"):
            raise UserError(
                f"{path} is a JSON array of other values than objects; write one object per document, "
                'such as {"text": "..."}'
            )
        elif json_objects.holds_objects(head):
            form, items = "json", json_objects.objects(stream, max_bytes)
        else:
            form, items = "jsonl", streams.lines(stream, max_bytes)
        count, position = 0, 0
        buffered: list[Item] = []
        size = 0
        for item in items:
            count += 1
            buffered.append(item)
            text = item.text if isinstance(item, Labeled) else item
            size += (len(text) if isinstance(text, bytes) else 0) + 64
            if size >= streams.BLOCK_BYTES:
                consumed, position = raw.tell() - position, raw.tell()
                yield Block(path, form, count - len(buffered) + 1, buffered, consumed)
                buffered, size = [], 0
        yield Block(path, form, count - len(buffered) + 1, buffered, raw.tell() - position)


def _column_blocks(
    file: str | BinaryIO, path: str, text_key: str, max_bytes: int, domain_key: str
) -> Iterator[Block]:
    first = 1
    for items, consumed in read_columns(file, text_key, max_bytes, path, domain_key):
        yield Block(path, "text", first, items, consumed)
        first += len(items)


def _id_blocks(copy: str, path: str, max_bytes: int) -> Iterator[Block]:
    """Yields blocks of documents as little-endian int64 ids, at most `max_bytes` ids per document."""
    items: list[bytes | None] = []
    first, num_ids = 1, 0
    for ids in read_documents(copy, max_bytes, path):
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
