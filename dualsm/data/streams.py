"""Text files as byte streams: decompression, encoding checks, and splitting into documents."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
from collections.abc import Iterator

import zstandard

from dualsm.data.text import foreign_encoding
from dualsm.process.errors import UserError
from dualsm.process.urls import file_name, open_input

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 16
_MAGIC = {
    rb"\x1f\x8b": ".gz",
    rb"\x28\xb5\x2f\xfd": ".zst",
    rb"[\x50-\x5f]\x2a\x4d\x18": ".zst",  # a skippable frame, as pzstd writes before each frame
    rb"BZh[1-9]1AY&SY": ".bz2",
    rb"\xfd7zXZ\x00": ".xz",
    rb"PK\x03\x04": "a ZIP archive",
    rb"\x04\x22\x4d\x18": "compressed by LZ4",
    rb"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    rb"PAR1": "a Parquet file",
    rb"ARROW1\x00\x00": "an Arrow file",
    rb"%PDF-": "a PDF",
}
_CHUNK_BYTES = 128  # compressed bytes per read: at most 32 zstandard blocks, which decompress to 4 MiB
_ZSTD_WINDOW = 1 << 31  # the maximum, used by `zstd --long=31`
_DOCUMENT_BYTES = 2048
_MAX_PARAGRAPH_BYTES = 2 * _DOCUMENT_BYTES


@contextlib.contextmanager
def open_text(path: str) -> Iterator[tuple[io.BufferedReader, io.BufferedIOBase, bytes]]:
    """Opens a text file, compressed or not.

    Yields:
      The file on disk, its decompressed content as a binary stream, and the first bytes of the content.

    Raises:
      UserError: if the file is not a text file, or its first bytes show an encoding other than UTF-8.
      OSError, EOFError, zlib.error: if the file cannot be read, or its compression is damaged.
    """
    with open_input(path) as raw:
        kind = _kind(raw.read(16), path)
    if kind and kind not in COMPRESSIONS:
        raise UserError(f"{path} is {kind}, not text; extract or convert it first")
    with open_input(path) as raw, _decompressed(raw, kind) as stream:
        head = stream.read(_HEAD_BYTES)
    if encoding := foreign_encoding(head):
        raise UserError(f"{path} is encoded in {encoding}; convert it to UTF-8, for example with iconv")
    with open_input(path, BLOCK_BYTES) as raw, _decompressed(raw, kind) as stream:
        yield raw, stream, head


def _kind(head: bytes, path: str) -> str | None:
    """Returns the suffix of a compression, a phrase for other formats, or None for plain text."""
    for magic, kind in _MAGIC.items():
        if re.match(magic, head):
            return kind
    suffix = os.path.splitext(file_name(path))[1].lower()
    return suffix if suffix in COMPRESSIONS else None


def _decompressed(raw: io.BufferedReader, kind: str | None):
    if kind == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if kind is None:
        return raw
    return io.BufferedReader(_FrameReader(raw, kind), 1 << 18)


class _FrameReader(io.RawIOBase):
    """Decompresses consecutive frames; like `gzip`, raises an error if the file ends inside a frame.

    The readers of the libraries are less strict: the zstandard reader accepts truncated files, and the
    readers of bz2 and lzma ignore a frame with a damaged header.
    """

    def __init__(self, raw: io.BufferedReader, kind: str):
        self._raw, self._kind, self._chunk, self._frame = raw, kind, b"", None
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._text:
            self._chunk = self._chunk or self._raw.read(_CHUNK_BYTES)
            if not self._chunk and self._frame is None:
                return 0
            if not self._chunk:
                raise EOFError("the compressed file is truncated; copy it again")
            self._text = memoryview(self._decompress())
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def _decompress(self) -> bytes:
        """Decompresses the chunk up to the end of its frame, and keeps the rest of the chunk."""
        if self._frame is None:
            self._chunk = self._chunk.lstrip(b"\0")  # padding
            if not self._chunk:
                return b""
            self._frame = _new_frame(self._kind)
        try:
            text = self._frame.decompress(self._chunk)
        except (zstandard.ZstdError, lzma.LZMAError) as error:
            raise OSError(str(error)) from error
        self._chunk = b""
        if self._frame.eof:
            self._chunk, self._frame = self._frame.unused_data, None
        return text


def _new_frame(kind: str):
    if kind == ".bz2":
        return bz2.BZ2Decompressor()
    if kind == ".xz":
        return lzma.LZMADecompressor()
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()


def lines(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[bytes | None]:
    """Yields the lines of a stream, blank lines included; None for lines longer than `max_bytes`.

    Line ends do not count. Longer lines are never held in memory completely.
    """
    limit = max_bytes + 2
    while line := stream.readline(limit):
        is_whole = len(line) < limit or line.endswith(b"\n")
        yield line if is_whole and len(line.rstrip(b"\r\n")) <= max_bytes else None
        while not is_whole and (rest := stream.readline(BLOCK_BYTES)):
            is_whole = rest.endswith(b"\n")


def is_blank(line: bytes) -> bool:
    """Returns True if a line has only whitespace, also of Unicode such as no-break and ideographic spaces."""
    line = line.strip()
    return not line or (line[0] >= 0x80 and not line.decode("utf-8", "replace").strip())


def ends_lines_by_cr(head: bytes) -> bool:
    """Returns True if lines end with a carriage return alone, as in files of old Macs."""
    return b"\r" in head.rstrip(b"\r") and b"\n" not in head


def documents(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[bytes | None]:
    """Yields paragraphs of a text, merged into documents of up to about 2 kB.

    Paragraphs end at blank lines. Long paragraphs are split at line ends. Blank lines between documents are
    dropped. Lines longer than `max_bytes` are None.
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
        if line is None or len(paragraph) + len(line) > _MAX_PARAGRAPH_BYTES:
            yield from finished()
        if line is None:
            if document:
                yield document.rstrip(b"\r\n")
            yield None
            document = gap = b""
        elif not is_blank(line):
            paragraph += line
        else:
            yield from finished()
            if len(gap) < _DOCUMENT_BYTES:
                gap += line
    yield from finished()
    if document:
        yield document.rstrip(b"\r\n")


def nonblank_lines(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[bytes | None]:
    """Yields the lines of a stream that are not blank, without their line ends; None for longer lines."""
    for line in lines(stream, max_bytes):
        if line is None or not is_blank(line):
            yield None if line is None else line.rstrip(b"\r\n")


def blank_line_blocks(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[bytes | None]:
    """Yields the lines between blank lines as one document; None for longer documents."""
    content, too_long = bytearray(), False

    def finished() -> Iterator[bytes | None]:
        nonlocal content, too_long
        if content or too_long:
            yield None if too_long else bytes(content).rstrip(b"\r\n")
        content, too_long = bytearray(), False

    for line in lines(stream, max_bytes):
        if line is not None and is_blank(line):
            yield from finished()
            continue
        too_long = too_long or line is None or len(content) + len(line.rstrip(b"\r\n")) > max_bytes
        if too_long:
            content.clear()
        else:
            content += line
    yield from finished()


def whole_file(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[bytes | None]:
    """Yields the content of a stream, or None if it is longer than `max_bytes`."""
    content = bytearray()
    while len(content) <= max_bytes and (chunk := stream.read(BLOCK_BYTES)):
        content += chunk
    yield bytes(content) if len(content) <= max_bytes else None


SPLITS = {  # how a text file is split into documents (`--split`)
    "paragraphs": documents,
    "line": nonblank_lines,
    "blank": blank_line_blocks,
    "file": whole_file,
}
