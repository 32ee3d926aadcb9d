"""The table of objectives. Each file of this package that decorates a function with `@objective` adds a row.

The config keys `mixture` and `objectives`, the checks of the options and the tables in docs/objectives.md are
derived from this table.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from dualsm.data.tokenizer import RESERVED_IDS, SPECIAL_PIECES
from dualsm.objectives.example import Example, Row, SpecialIds
from dualsm.process.errors import UserError
from dualsm.process.value_rules import ANY, Rule, at_least


class Option(NamedTuple):
    """An option of an objective. Its default is the default of the function's argument of the same name.

    Attributes:
      doc: explanation in one line.
      rule: valid values.
      defines_task: validation uses the run's value of the option. For all other options it uses the default,
        so that runs with different options are scored on the same task.
    """

    doc: str
    rule: Rule = ANY
    defines_task: bool = False


WEIGHT = Option("Factor on the loss of the objective's rows.", at_least(0))


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table; see `objective` for the attributes."""

    function: Callable[..., Example]
    order: int
    view: str
    sees: str
    predicts: str
    averages_over: str
    options: Mapping[str, Option]
    mode_tokens: Mapping[str, int]
    check: Callable[[Mapping], str]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of each option."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def __call__(self, row: Row, key: jax.Array, special: SpecialIds, **options) -> Example:
        return self.function(row, key, special, **options)


OBJECTIVES: dict[str, Objective] = {}


def objective(
    *,
    order: int,
    view: Literal["causal", "prefix", "block", "document"],
    sees: str,
    predicts: str,
    averages_over: str,
    mode_tokens: Mapping[str, int] | None = None,
    check: Callable[[Mapping], str] = lambda options: "",
    **options: Option,
) -> Callable[[Callable[..., Example]], Callable[..., Example]]:
    """Returns a decorator that adds an objective to `OBJECTIVES` under the name of the function.

    Args:
      order: position in the table. The rounding of rows per step depends on the order, so existing positions
        never change; a new objective gets the next number.
      view: keys that a position attends to: the document up to the position, also a prefix, up to the end of
        the position's block, or all of it.
      sees: description of `view` in the docs.
      predicts: target of position i in the docs.
      averages_over: tokens that the loss is a mean over, in the docs.
      mode_tokens: name -> id of the mode tokens and sentinels in its inputs, from 5 to `RESERVED_IDS` - 1.
        Two objectives may use the same id; they cannot be trained in the same run.
      check: returns an error message if options do not fit together, else "".
      **options: one `Option` per keyword argument of the function.

    Raises:
      TypeError: if the options are not the keyword arguments of the function.
      ValueError: if the order is taken or a mode token's id is out of range.
    """
    mode_tokens = dict(mode_tokens or {})

    def register(function: Callable[..., Example]) -> Callable[..., Example]:
        new = Objective(
            function, order, view, sees, predicts, averages_over, options, mode_tokens, check
        )  # fmt: skip
        if new.defaults.keys() != options.keys():
            raise TypeError(f"{new.name} has the arguments {[*new.defaults]} but the options {[*options]}")
        if order in (other.order for other in OBJECTIVES.values()):
            raise ValueError(f"{new.name}: order={order} is taken")
        if not all(len(SPECIAL_PIECES) <= token < RESERVED_IDS for token in mode_tokens.values()):
            raise ValueError(f"{new.name}: mode tokens {mode_tokens} must have reserved ids")
        table = sorted([*OBJECTIVES.values(), new], key=lambda row: row.order)
        OBJECTIVES.clear()
        OBJECTIVES.update((row.name, row) for row in table)
        return function

    return register


def default_options() -> dict[str, dict[str, Any]]:
    """Returns the default of `config.objectives`: objective -> option -> value."""
    return {name: {"weight": 1.0} | row.defaults for name, row in OBJECTIVES.items()}


def valid_options(options: Mapping[str, Mapping]) -> dict[str, dict]:
    """Returns the options of validation: the run's values of options that define the task, else defaults.

    Args:
      options: `config.objectives`.
    """
    return {
        name: {key: options[name][key] for key, option in row.options.items() if option.defines_task}
        for name, row in OBJECTIVES.items()
    }


def check_options(options: Mapping[str, Mapping]) -> None:
    """Raises `UserError`, naming the key, for invalid options.

    Args:
      options: `config.objectives`, with valid keys and types.
    """
    for name, row in OBJECTIVES.items():
        where = f"config.objectives.{name}"
        for key, option in ({"weight": WEIGHT} | row.options).items():
            option.rule.check(f"{where}.{key}", options[name][key])
        if message := row.check(options[name]):
            raise UserError(f"{where}: {message}")


def check_mode_tokens(names: list[str]) -> None:
    """Raises `UserError` if two objectives of a run use one id for different mode tokens."""
    users: dict[int, str] = {}
    for name in names:
        for token in OBJECTIVES[name].mode_tokens.values():
            if token in users:
                raise UserError(
                    f"config.mixture: {users[token]} and {name} use the reserved id {token} for different "
                    "mode tokens; train only one of them"
                )
        users |= dict.fromkeys(OBJECTIVES[name].mode_tokens.values(), name)
