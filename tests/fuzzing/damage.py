"""Strategies that damage files: flipped bits, missing or repeated parts, values of other types."""

from __future__ import annotations

import json

from hypothesis import strategies as st

ODD_NUMBERS = [0, -1, 1, 2, 3, 7, 255, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308]
NO_NUMBERS = [float("nan"), float("inf"), float("-inf")]
ODD_TEXTS = [
    "", " ", "0", "x", "../../x", "/dev/null", "..", "nul \0", "\ud800", "🙂" * 50, "a" * 300, "1e999",
    "<mask>", "%s{0}", "\n",
]  # fmt: skip
ODD_VALUES = [None, True, False, [], {}, [[]], [None], {"": None}, *ODD_NUMBERS, *NO_NUMBERS, *ODD_TEXTS]
_ENCODINGS = ["utf-16", "utf-8-sig", "utf-32", "cp037"]


def odd_values() -> st.SearchStrategy:
    """Returns a strategy for unexpected values."""
    return st.sampled_from(ODD_VALUES) | st.integers() | st.floats() | st.text(max_size=20)


@st.composite
def damaged(draw, content: bytes) -> bytes | None:
    """Draws the content of a damaged file; None: the file is missing."""
    kinds = [_flipped, _cut, _without_a_part, _with_junk, _doubled_part, _other, _gone]
    if _is_json(content):
        kinds += [_json_changed] * 7
    elif b"\n" in content and _is_json(content[: content.index(b"\n")]):
        kinds += [_line_changed] * 7
    return draw(st.sampled_from(kinds))(draw, content)


@st.composite
def changed(draw, value):
    """Draws a JSON value in which one part is missing, repeated or of another type."""
    parts = list(_containers(value))
    if not parts:
        return draw(odd_values())
    container, key = draw(st.sampled_from(parts))
    action = draw(st.sampled_from(["replace", "replace", "replace", "delete", "double", "nest"]))
    if action == "replace":
        container[key] = draw(odd_values())
    elif action == "delete":
        del container[key]
    elif action == "nest":
        container[key] = [container[key]]
    elif isinstance(container, list):
        container.insert(key, container[key])
    else:
        container[f"{key}2"] = container[key]
    return value


def _containers(value):
    """Yields every (container, key) in a JSON value."""
    keys = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
    for key in keys:
        yield value, key
        yield from _containers(value[key])


def _is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), (dict, list))
    except (ValueError, RecursionError):
        return False


def _part(draw, content: bytes) -> tuple[int, int]:
    first = draw(st.integers(0, len(content)))
    return first, min(len(content), first + draw(st.integers(1, 64) | st.integers(1, 1 << 14)))


def _flipped(draw, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 4))) if content else ():
        damaged[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(damaged)


def _cut(draw, content: bytes) -> bytes:
    return content[: draw(st.integers(0, len(content)))]


def _without_a_part(draw, content: bytes) -> bytes:
    first, last = _part(draw, content)
    return content[:first] + content[last:]


def _with_junk(draw, content: bytes) -> bytes:
    first, last = _part(draw, content)
    junk = draw(st.binary(max_size=64))
    return content[:first] + junk + content[draw(st.sampled_from([first, last])) :]


def _doubled_part(draw, content: bytes) -> bytes:
    first, last = _part(draw, content)
    return content[:first] + content[first:last] * draw(st.integers(2, 5)) + content[last:]


def _other(draw, content: bytes) -> bytes:
    """Draws unrelated content, or the same content in another encoding."""
    try:
        encodings = [content.decode("utf-8").encode(name) for name in _ENCODINGS]
    except UnicodeError:
        encodings = []
    deep = b"[" * 20_000
    junk = [b"", b"\0" * len(content), b"\xff" * 100, b"{}", b"[]", b"null", deep, content * 2, *encodings]
    return draw(st.sampled_from(junk) | st.binary(max_size=200))


def _gone(draw, content: bytes) -> None:
    return None


def _json_changed(draw, content: bytes) -> bytes:
    return json.dumps(draw(changed(json.loads(content)))).encode()


def _line_changed(draw, content: bytes) -> bytes:
    lines = content.split(b"\n")
    number = draw(st.integers(0, len(lines) - 1))
    change = _json_changed if _is_json(lines[number]) else _flipped
    lines[number] = change(draw, lines[number])
    return b"\n".join(lines)
