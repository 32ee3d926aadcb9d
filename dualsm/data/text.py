"""Decoding of text: byte-order marks, detection of encodings other than UTF-8, and lenient JSON."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

_BYTE_ORDER_MARKS = {  # UTF-32 first: its mark starts with the mark of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x84\x31\x95\x33": "GB18030",
    b"+/v8": "UTF-7",
    b"+/v9": "UTF-7",
}
_ISO_2022 = re.compile(rb"\x1b\$[@AB(),]")
_MAX_DIGITS = 640  # of an integer; the lowest value that Python's own limit can have
_STRINGS_AND_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def without_bom(content: bytes) -> bytes:
    """Returns the bytes without a leading UTF-8 byte-order mark."""
    return content.removeprefix(codecs.BOM_UTF8)


def foreign_encoding(head: bytes) -> str | None:
    """Detects encodings whose bytes can be valid UTF-8, from the first bytes of a file.

    Detects UTF-16 and UTF-32 with or without a byte-order mark, other encodings by their byte-order mark, and
    encodings that switch character sets with escape sequences (ISO 2022).

    Returns:
      The name of the encoding; None for UTF-8 and undetected encodings.
    """
    for mark, name in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return name
    if any(head) and len(head) >= 4:
        bytes_4 = [head[i : len(head) // 4 * 4 : 4] for i in range(4)]
        for high, low in ((bytes_4[3], bytes_4[2]), (bytes_4[0], bytes_4[1])):
            if not any(high) and max(low) <= 3:  # the planes of Unicode that are in use
                return "UTF-32"
        controls = [sum(map(half.count, range(32))) / len(half) for half in (head[0::2], head[1::2])]
        high = head[controls[1] > controls[0] :: 2]  # the high bytes of 16-bit units, if it is UTF-16
        if 0 in high and max(controls) > 0.8 and min(controls) <= 0.5:
            return "UTF-16"
    return "ISO-2022" if _ISO_2022.search(head) else None


def likely_encoding(content: bytes) -> str:
    """Guesses the encoding of bytes that are not valid UTF-8; returns a phrase for messages."""
    if name := foreign_encoding(content):
        return name
    valid = content.decode("utf-8", "ignore").encode()
    high, valid_high = (sum(byte > 127 for byte in data) for data in (content, valid))
    if valid_high > high - valid_high:
        return "damaged UTF-8"
    if high <= sum(byte < 128 for byte in content) / 2:
        return "perhaps Latin-1 or Windows-1252"
    return "perhaps GB18030, Shift_JIS, Windows-1251 or similar"


def parse_json(content: bytes | str) -> Any:
    """Parses JSON, tolerating values that Python's parser or UTF-8 reject.

    Integers with too many digits become floats, strings may contain control characters, and invalid UTF-8
    becomes lone surrogates. If containers are nested too deeply, those inside the outermost become null.

    Raises:
      ValueError: if the content is not JSON.
    """
    text = content
    if isinstance(content, bytes):
        text = without_bom(content).decode("utf-8", "surrogateescape")
    try:
        return _DECODER.decode(text)
    except RecursionError:
        return _DECODER.decode(_without_nested(text))


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


_DECODER = json.JSONDecoder(parse_int=_integer, strict=False)


def _without_nested(text: str) -> str:
    """Replaces all containers inside the outermost one with null."""
    kept, depth, start = [], 0, 0
    for mark in _STRINGS_AND_BRACKETS.finditer(text):
        if mark[0] in "[{":
            depth += 1
            if depth == 2:
                kept.append(text[start : mark.start()] + "null")
        elif mark[0] in "]}":
            if depth == 2:
                start = mark.end()
            depth -= 1
    return "".join(kept) + (text[start:] if depth < 2 else "")
