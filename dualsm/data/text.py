"""Text as bytes: byte-order marks, encodings other than UTF-8, and JSON from many writers."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

_BYTE_ORDER_MARKS = {  # UTF-32 before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x84\x31\x95\x33": "GB18030",
    b"+/v8": "UTF-7",
    b"+/v9": "UTF-7",
}
_ISO_2022 = re.compile(rb"\x1b\$[@AB(),]")
_MOST_DIGITS = 640  # of an integer; Python's limit cannot be set lower
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def without_bom(content: bytes) -> bytes:
    """Returns the bytes without UTF-8's byte-order mark in front."""
    return content.removeprefix(codecs.BOM_UTF8)


def foreign_encoding(head: bytes) -> str | None:
    """Returns the name of the encoding that a file's first bytes show, or None for UTF-8 and unknown ones.

    Finds the encodings whose bytes can pass for UTF-8: those in units of 16 or 32 bits, with or without a
    byte-order mark, and those that switch character sets by escape sequences.
    """
    for mark, name in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return name
    if any(head) and len(head) >= 4:
        bytes_4 = [head[i : len(head) // 4 * 4 : 4] for i in range(4)]
        for high, low in ((bytes_4[3], bytes_4[2]), (bytes_4[0], bytes_4[1])):
            if not any(high) and max(low) <= 3:  # planes that are in use
                return "UTF-32"
        shares = [sum(map(half.count, range(32))) / len(half) for half in (head[0::2], head[1::2])]
        high = head[shares[1] > shares[0] :: 2]
        if 0 in high and max(shares) > 0.8 and min(shares) <= 0.5:
            return "UTF-16"
    return "ISO-2022" if _ISO_2022.search(head) else None


def likely_encoding(content: bytes) -> str:
    """Returns a guess, in words, at the encoding of bytes that are not UTF-8."""
    if name := foreign_encoding(content):
        return name
    valid = content.decode("utf-8", "ignore").encode()
    high, valid_high = (sum(byte > 127 for byte in part) for part in (content, valid))
    if valid_high > high - valid_high:
        return "damaged UTF-8"
    if high <= sum(byte < 128 for byte in content) / 2:
        return "perhaps Latin-1 or Windows-1252"
    return "perhaps GB18030, Shift_JIS, Windows-1251 or the like"


def parse_json(content: bytes | str) -> Any:
    """Returns a JSON value, whatever stands in those parts of it that are not used.

    Integers beyond Python's limit of digits become floats, control characters may stand in strings, invalid
    UTF-8 becomes lone surrogates, and where values are nested too deeply those inside the outermost are null.

    Raises:
      ValueError: when the content is not JSON.
    """
    text = content
    if isinstance(content, bytes):
        text = without_bom(content).decode("utf-8", "surrogateescape")
    try:
        return _DECODER.decode(text)
    except RecursionError:
        return _DECODER.decode(_without_nested(text))


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


_DECODER = json.JSONDecoder(parse_int=_integer, strict=False)


def _without_nested(text: str) -> str:
    """Replaces every container inside the outermost one by null."""
    parts, depth, start = [], 0, 0
    for mark in _MARKS.finditer(text):
        if mark[0] in "[{":
            depth += 1
            if depth == 2:
                parts.append(text[start : mark.start()] + "null")
        elif mark[0] in "]}":
            if depth == 2:
                start = mark.end()
            depth -= 1
    return "".join(parts) + (text[start:] if depth < 2 else "")
