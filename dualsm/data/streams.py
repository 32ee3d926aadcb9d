"""Text files as streams of bytes: decompressed, of known encoding, cut into lines, objects or documents."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

import zstandard

from dualsm.data.text import foreign_encoding, without_bom
from dualsm.process.errors import UserError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 16
_MAGIC = {
    rb"\x1f\x8b": ".gz",
    rb"\x28\xb5\x2f\xfd": ".zst",
    rb"[\x50-\x5f]\x2a\x4d\x18": ".zst",  # a frame of no text, as pzstd writes before each other
    rb"BZh[1-9]1AY&SY": ".bz2",
    rb"\xfd7zXZ\x00": ".xz",
    rb"PK\x03\x04": "a ZIP archive",
    rb"\x04\x22\x4d\x18": "compressed by LZ4",
    rb"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    rb"PAR1": "a Parquet file",
    rb"ARROW1\x00\x00": "an Arrow file",
    rb"%PDF-": "a PDF",
}
_PIECE_BYTES = 128  # compressed bytes taken at once: 32 blocks of zstandard at most, which unpack to 4 MiB
_ZSTD_WINDOW = 1 << 31  # the largest there is, that of `zstd --long=31`
_DOCUMENT_BYTES = 2048
_LONGEST_PARAGRAPH = 2 * _DOCUMENT_BYTES
_JSON_MARKS = re.compile(rb'\\.|["{}]', re.DOTALL)


@contextlib.contextmanager
def open_text(path: str) -> Iterator[tuple[io.BufferedReader, io.BufferedIOBase, bytes]]:
    """Opens a text file of any compression.

    Yields:
      The file as it is on disk, its text as a binary stream, and the first bytes of the text.

    Raises:
      UserError: when the text is not UTF-8 by its first bytes, or the file is of another kind.
      OSError, EOFError, zlib.error: when the file cannot be read or its compression is damaged.
    """
    with open(path, "rb") as raw:
        kind = _kind(raw.read(16), path)
    if kind and kind not in COMPRESSIONS:
        raise UserError(f"{path} is {kind}, not text; unpack or convert it first")
    with open(path, "rb") as raw, _decompressed(raw, kind) as stream:
        head = stream.read(_HEAD_BYTES)
    if encoding := foreign_encoding(head):
        raise UserError(f"{path} is encoded in {encoding}; convert it to UTF-8, for example with iconv")
    with open(path, "rb", BLOCK_BYTES) as raw, _decompressed(raw, kind) as stream:
        yield raw, stream, head


def _kind(head: bytes, path: str) -> str | None:
    """A compression by its suffix, or another kind of file in words; None for plain text."""
    for magic, kind in _MAGIC.items():
        if re.match(magic, head):
            return kind
    suffix = Path(path).suffix.lower()
    return suffix if suffix in COMPRESSIONS else None


def _decompressed(raw: io.BufferedReader, kind: str | None):
    if kind == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if kind is None:
        return raw
    return io.BufferedReader(_FrameReader(raw, kind), 1 << 18)


class _FrameReader(io.RawIOBase):
    """Text of compressed frames, one after another; an end inside a frame is an error, as it is in gzip.

    zstandard's own reader takes any end of the file for the end of the text, and those of bzip2 and xz
    ignore a frame whose beginning is damaged.
    """

    def __init__(self, raw: io.BufferedReader, kind: str):
        self._raw, self._kind, self._piece, self._frame = raw, kind, b"", None
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._text:
            self._piece = self._piece or self._raw.read(_PIECE_BYTES)
            if not self._piece and self._frame is None:
                return 0
            if not self._piece:
                raise EOFError("the compressed file is cut short: it ends inside a frame")
            self._text = memoryview(self._unpack())
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def _unpack(self) -> bytes:
        """Unpacks the piece up to the end of its frame; the rest stays in the piece."""
        if self._frame is None:
            self._piece = self._piece.lstrip(b"\0")  # padding
            if not self._piece:
                return b""
            self._frame = _new_frame(self._kind)
        try:
            text = self._frame.decompress(self._piece)
        except (zstandard.ZstdError, lzma.LZMAError) as error:
            raise OSError(str(error)) from error
        self._piece = b""
        if self._frame.eof:
            self._piece, self._frame = self._frame.unused_data, None
        return text


def _new_frame(kind: str):
    if kind == ".bz2":
        return bz2.BZ2Decompressor()
    if kind == ".xz":
        return lzma.LZMADecompressor()
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()


def lines(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[bytes | None]:
    """Yields the lines of a stream; None for one that is too long, which is never held whole.

    Blank lines are yielded too, except a last empty one.
    """
    limit = max_bytes + 1
    while line := stream.readline(limit):
        if len(line) < limit or line.endswith(b"\n"):
            yield line
            continue
        while rest := stream.readline(BLOCK_BYTES):
            if rest.endswith(b"\n"):
                break
        yield None


def holds_objects(head: bytes) -> bool:
    """Returns True for JSON in which objects are not lines: an array, or objects over several lines."""
    head = without_bom(head).lstrip()
    return head.startswith(b"[") or head.partition(b"\n")[0].strip() == b"{"


def objects(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[bytes | None]:
    """Yields the outermost JSON objects of a stream, and what else stands between them; None for long ones.

    Raises:
      EOFError: when the stream ends inside an array, an object or a string.
    """
    item, depth, in_string, in_array = _Item(max_bytes), 0, False, False
    while chunk := stream.read(BLOCK_BYTES):
        while chunk.endswith(b"\\") and (more := stream.read(1)):  # an escape is not divided
            chunk += more
        start = 0
        for mark in _JSON_MARKS.finditer(chunk):
            if mark[0] == b'"':
                in_string = not in_string
            elif in_string or len(mark[0]) > 1:
                continue
            elif mark[0] == b"{":
                if depth == 0:
                    item.add(chunk[start : mark.start()])
                    in_array |= b"[" in item.content
                    yield from item.take(b" \t\r\n,[]")
                    start = mark.start()
                depth += 1
            elif depth:
                depth -= 1
                if depth == 0:
                    item.add(chunk[start : mark.end()])
                    yield from item.take(b"")
                    start = mark.end()
        item.add(chunk[start:])
    if depth or in_string or (in_array and b"]" not in item.content):
        raise EOFError("it ends inside a JSON value")
    yield from item.take(b" \t\r\n,[]")


class _Item:
    """Bytes that are put together; those beyond `max_bytes` are not kept."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self.content, self._too_long = max_bytes, bytearray(), False

    def add(self, part: bytes) -> None:
        self._too_long |= len(self.content) + len(part) > self._max_bytes
        if not self._too_long:
            self.content += part

    def take(self, separators: bytes) -> Iterator[bytes | None]:
        """Yields the item, if more than separators is in it, and begins the next one."""
        content, too_long = without_bom(bytes(self.content)).strip(separators or None), self._too_long
        self.content, self._too_long = bytearray(), False
        if too_long or content:
            yield None if too_long else content


def documents(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[bytes | None]:
    """Yields the paragraphs of a text, merged up to about 2 kB; None for a line that is too long.

    Blank lines end a paragraph. A text that has none is divided at line ends. Blank lines between documents
    belong to neither.
    """
    document, gap, paragraph = b"", b"", b""

    def finished() -> Iterator[bytes]:
        nonlocal document, gap, paragraph
        if document and paragraph and len(document) + len(gap) + len(paragraph) > _DOCUMENT_BYTES:
            yield document.rstrip(b"\r\n")
            document = b""
        if paragraph:
            document = document + gap + paragraph if document else paragraph
            gap, paragraph = b"", b""

    for line in lines(stream, max_bytes):
        if line is None or len(paragraph) + len(line) > _LONGEST_PARAGRAPH:
            yield from finished()
        if line is None:
            if document:
                yield document.rstrip(b"\r\n")
            yield None
            document = gap = b""
        elif line.strip():
            paragraph += line
        else:
            yield from finished()
            if len(gap) < _DOCUMENT_BYTES:
                gap += line
    yield from finished()
    if document:
        yield document.rstrip(b"\r\n")
