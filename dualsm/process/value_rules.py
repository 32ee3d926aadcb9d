"""Valid ranges of config keys and options."""

from __future__ import annotations

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
