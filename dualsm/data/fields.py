"""The text of a record: a field, a nested field, or several fields joined (`--text_key`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from dualsm.data.faults import Fault

SEPARATOR = "\n\n"  # between joined fields
_MAX_KEYS, _MAX_KEY = 8, 42  # keys listed in an error, and characters of each


def names_of(text_key: str, existing: Collection[str]) -> list[str]:
    """Returns the fields that a text key names; a field whose name contains a comma takes precedence."""
    return [text_key] if text_key in existing else text_key.split(",")


def join(parts: Iterable[str | None]) -> str:
    """Joins the values of fields, without null and empty values."""
    return SEPARATOR.join(part for part in parts if part)


def json_text(value: Any, text_key: str, seen: set[str] | None = None) -> str:
    """Returns the text of a JSON object.

    Args:
      value: parsed JSON.
      text_key: names of fields, separated by commas; `a.b` is the field `b` of the object `a`, unless a field
        is named `a.b`.
      seen: the names of the fields that exist are added to it.

    Raises:
      Fault: if a field is not a string or none exists. If there are several names, null and missing fields
        are accepted.
    """
    if not isinstance(value, dict):
        raise Fault("no_text", "not a JSON object")
    names = names_of(text_key, value)
    parts = []
    for name in names:
        try:
            part = field_of(value, name)
        except KeyError:
            continue
        if seen is not None:
            seen.add(name)
        if not isinstance(part, str) and not (part is None and len(names) > 1):
            raise Fault("no_text", _problem(value, name, "is not a string"))
        parts.append(part)
    if not parts:
        raise Fault("no_text", _problem(value, text_key, "does not exist"))
    return parts[0] if len(names) == 1 else join(parts)


def field_of(value: dict, name: str) -> Any:
    """Returns a field of a JSON object; `a.b` as in `json_text`. Raises `KeyError` if it does not exist."""
    if name in value:
        return value[name]
    head, _, tail = name.partition(".")
    if tail and isinstance(value.get(head), dict):
        return field_of(value[head], tail)
    raise KeyError(name)


def listed(names: Iterable[str]) -> str:
    """Returns the first names, each cut to `_MAX_KEY` characters, for an error message."""
    found = [name[:_MAX_KEY] for name, _ in zip(names, range(_MAX_KEYS + 1), strict=False)]
    found[_MAX_KEYS:] = ["..."] * (len(found) > _MAX_KEYS)
    return ", ".join(found)


def _problem(value: dict, name: str, problem: str) -> str:
    keys = listed(repr(key) for key in _paths(value))
    return f"--text_key={name} {problem}; the keys are {keys or 'none'}"


def _paths(value: dict) -> Iterator[str]:
    """Yields the keys of an object; for a key with an object, the keys in that object, such as `a.b`."""
    for key, field in value.items():
        if isinstance(field, dict) and field:
            yield from (f"{key}.{inner}" for inner in field)
        else:
            yield key
