"""JSON that is not JSON Lines: its objects in a byte stream, also if some of them are malformed."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from dualsm.data import streams
from dualsm.data.faults import Fault
from dualsm.data.text import without_bom

_QUOTES_AND_BRACES = re.compile(rb'\\.|["{}]', re.DOTALL)
_SEPARATORS = b" \t\r\n,"


def holds_objects(head: bytes) -> bool:
    """Returns True if the content is JSON other than JSON lines.

    That is an array, objects over several lines, or several objects in one line. A malformed first line does
    not count as an object over several lines.
    """
    head = without_bom(head).lstrip()
    if head.startswith(b"["):
        return True
    line, _, rest = head.partition(b"\n")
    depth, in_string = 0, False
    for mark in _QUOTES_AND_BRACES.finditer(line):
        if mark[0] == b'"':
            in_string = not in_string
        elif not in_string and mark[0] in (b"{", b"}"):
            depth += 1 if mark[0] == b"{" else -1
            if not depth:
                return line[mark.end() :].lstrip(b" \t\r,").startswith(b"{")
    return bool(depth) and not in_string and rest.lstrip()[:1] in (b'"', b"}")


def first_value(head: bytes) -> bytes:
    """Returns the first character of the first value of a JSON array; b"" if the content is not an array."""
    head = without_bom(head).lstrip()
    return head[1:].lstrip()[:1] if head.startswith(b"[") else b""


def count_objects(content: bytes) -> int:
    """Returns an estimate of the number of objects that an unpaired quotation mark joins in malformed JSON.

    The end of one object and the start of the next one are inside of a string then. Arrays of objects in
    these objects count too.
    """
    count, in_string, closed = 1, False, -1
    for mark in _QUOTES_AND_BRACES.finditer(content):
        if mark[0] == b'"':
            in_string = not in_string
        elif mark[0] == b"{":
            count += in_string and _joins(content, closed, mark.start())
        elif mark[0] == b"}":
            closed = mark.end()
    return count


def _joins(content: bytes, closed: int, opened: int) -> bool:
    """Returns True if only separators are between the end of a closing brace and an opening one."""
    return closed >= 0 and not content[closed:opened].strip(_SEPARATORS)


def objects(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[bytes | Fault]:
    """Yields the outermost JSON objects of a stream, and any other content between them.

    Items longer than `max_bytes` are faults.

    Raises:
      EOFError: if the stream ends inside an array, an object or a string.
    """
    item, depth, in_string, in_array = _Item(max_bytes), 0, False, False
    while chunk := stream.read(streams.BLOCK_BYTES):
        while chunk.endswith(b"\\") and (more := stream.read(1)):  # keep escape sequences whole
            chunk += more
        start, closed = 0, -1
        for mark in _QUOTES_AND_BRACES.finditer(chunk):
            if mark[0] == b'"':
                in_string = not in_string
            elif in_string:
                if mark[0] == b"}":
                    closed = mark.end()
                elif mark[0] == b"{" and _joins(chunk, closed, mark.start()):
                    item.joined += 1
            elif len(mark[0]) > 1:
                continue
            elif mark[0] == b"{":
                if depth == 0:
                    item.add(chunk[start : mark.start()])
                    in_array = item.ends_in_array(in_array)
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
    if depth or in_string or item.ends_in_array(in_array):
        raise EOFError("the file ends inside a JSON value")
    yield from item.take(b" \t\r\n,[]")


class _Item:
    """A buffer that keeps at most `max_bytes` bytes.

    Attributes:
      joined: number of further objects whose starts are inside of strings of the content.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._clear()

    def _clear(self) -> None:
        self._content, self._too_long, self.joined = bytearray(), False, 0

    def add(self, data: bytes) -> None:
        self._too_long |= len(self._content) + len(data) > self._max_bytes
        if not self._too_long:
            self._content += data

    def ends_in_array(self, before: bool) -> bool:
        """Returns True if the end of the content is in an array, given the same of its start."""
        begin, end = self._content.rfind(b"["), self._content.rfind(b"]")
        return before if begin == end else begin > end

    def take(self, separators: bytes) -> Iterator[bytes | Fault]:
        """Yields the content unless it consists of separators only, and clears the buffer."""
        content = without_bom(bytes(self._content)).strip(separators or None)
        fault = Fault("too_long", documents=1 + self.joined) if self._too_long else None
        self._clear()
        if fault or content:
            yield fault or content
