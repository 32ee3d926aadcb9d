"""Valid ranges of config keys and options."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from dualsm.process.errors import UserError


class Rule(NamedTuple):
    """A condition that a value must satisfy.

    Attributes:
      holds: returns True for valid values.
      text: follows "must" in error messages and describes the range in the docs.
    """

    holds: Callable[[Any], Any]
    text: str

    def check(self, name: str, value: Any) -> None:
        """Raises `UserError` if the value is invalid; `name` is the full name of the key."""
        if not self.holds(value):
            raise UserError(f"{name}={value} must {self.text}")


ANY = Rule(lambda v: True, "")
POSITIVE = Rule(lambda v: v > 0, "be positive")
FRACTION = Rule(lambda v: 0 <= v <= 1, "be in [0, 1]")
BELOW_ONE = Rule(lambda v: 0 <= v < 1, "be in [0, 1)")

_COUNT = re.compile(r"(\d+)([KMB]?)")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
COUNTS = Rule(
    lambda v: not v or all(map(_COUNT.fullmatch, v.split(","))),
    "list numbers such as 1M,2M,1B, separated by commas without spaces",
)


def parse_count(text: str) -> int:
    """Returns the number that a text such as 500, 10K, 1M or 2B stands for."""
    number, unit = _COUNT.fullmatch(text).groups()
    return int(number) * _UNITS[unit]


def at_least(low: float) -> Rule:
    return Rule(lambda v: v >= low, f"be at least {low}")


def between(low: int, high: int) -> Rule:
    return Rule(lambda v: low <= v <= high, f"be from {low} to {high}")


def one_of(names: Iterable[str]) -> Rule:
    names = tuple(names)
    return Rule(lambda v: v in names, f"be one of {', '.join(names)}")


def subset_of(names: Iterable[str]) -> Rule:
    """Returns the rule of a text that lists some of `names`, separated by commas."""
    names = tuple(names)
    text = f"list some of {','.join(names)}, separated by commas without spaces"
    return Rule(
        lambda v: not v or set(v.split(",")) <= set(names),
        text,
    )
