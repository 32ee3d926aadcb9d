"""Domains of held-out documents, such as books or web pages (`--domain_key`)."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from typing import Any, NamedTuple

from dualsm.data.fields import field_of
from dualsm.data.inputs import SUFFIXES
from dualsm.data.streams import COMPRESSIONS
from dualsm.data.text import parse_json
from dualsm.process.errors import UserError
from dualsm.process.urls import file_name

FILE_DOMAIN = "@file"  # `--domain_key` that makes the name of a document's file its domain
NO_DOMAIN = "(none)"  # of documents that lack the field
MAX_DOMAINS = 256
_MAX_CHARACTERS = 100
WITHOUT_FIELDS = ("text", "ids")  # formats of files, see `inputs.format_of`


class Labeled(NamedTuple):
    """The undecoded text of a row, and the value of its domain column."""

    text: bytes
    domain: str | None


def file_domain(path: str) -> str:
    """Returns the name of a file without the suffixes of its format and its compression."""
    name = file_name(path)
    for suffixes in (COMPRESSIONS, SUFFIXES):
        stem, suffix = os.path.splitext(name)
        name = stem if suffix.lower() in suffixes else name
    return domain_name(name)


def json_domain(item: bytes, key: str) -> str:
    """Returns the domain of a JSON object; `NO_DOMAIN` if it lacks the field.

    Args:
      item: the object, which is valid JSON.
      key: name of the field; `a.b` is the field `b` of the object `a`.

    Raises:
      ValueError: if the value cannot be a domain; see `domain_name`.
    """
    try:
        return domain_name(field_of(parse_json(item), key))
    except KeyError:
        return NO_DOMAIN


def domain_name(value: Any) -> str:
    """Returns the domain for the value of a field, with single spaces; `NO_DOMAIN` if it is null or blank.

    Raises:
      ValueError: if the value is neither a string nor a number, or too long.
    """
    if isinstance(value, (list, dict)):
        raise ValueError("is neither a string nor a number; choose another field")
    text = value if isinstance(value, str) else json.dumps(value) if value is not None else ""
    name = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    if len(name) > _MAX_CHARACTERS:
        raise ValueError(f"has {len(name)} characters, more than {_MAX_CHARACTERS}; choose another field")
    return name or NO_DOMAIN


def check_formats(key: str, formats: Collection[str], flag: str) -> None:
    """Raises `UserError` if a domain key names a field, but files of one of the formats have none.

    Args:
      key: the domain key.
      formats: formats of the files whose documents are held out.
      flag: the flag of these files.
    """
    if key not in ("", FILE_DOMAIN) and set(formats) & set(WITHOUT_FIELDS):
        raise UserError(
            f"--domain_key={key}: files of {flag} are text or token ids, which have no fields; pass "
            f"--domain_key={FILE_DOMAIN} to use the names of the files"
        )


def check_domains(key: str, names: Collection[str]) -> None:
    """Raises `UserError` if no document has a domain, or if there are too many domains."""
    if set(names) == {NO_DOMAIN}:
        raise UserError(f"--domain_key={key}: no held-out document has this field; check its name")
    if len(names) > MAX_DOMAINS:
        raise UserError(
            f"--domain_key={key} has more than {MAX_DOMAINS} values, such as {sorted(names)[0]!r}; choose a "
            "field with fewer"
        )
