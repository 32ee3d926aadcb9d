"""Sets of token ids, written as ranges: "0-1,4,10-15"."""

from __future__ import annotations

import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp

_SYNTAX = re.compile(r"(\d+(-\d+)?(,\d+(-\d+)?)*)?")


def is_valid(text: str) -> bool:
    """Returns True if a text consists of ranges, or is empty."""
    return bool(_SYNTAX.fullmatch(text)) and all(first <= last for first, last in parse(text))


def parse(text: str) -> list[tuple[int, int]]:
    """Returns the first and last id of each range."""
    ranges = [part.split("-") for part in text.split(",") if part]
    return [(int(part[0]), int(part[-1])) for part in ranges]


def join(ids: Iterable[int]) -> str:
    """Writes ids as ranges."""
    ranges: list[list[int]] = []
    for token in sorted(set(map(int, ids))):
        if ranges and ranges[-1][1] == token - 1:
            ranges[-1][1] = token
        else:
            ranges.append([token, token])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def contains(text: str, ids_V: jax.Array) -> jax.Array:
    """Returns True for the ids that are in the ranges, bool [V]."""
    found_V = jnp.zeros(ids_V.shape, bool)
    for first, last in parse(text):
        found_V |= (ids_V >= first) & (ids_V <= last)
    return found_V
