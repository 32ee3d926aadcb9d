"""Entries of the mixture: objectives, and pairs of objectives that share their sequences (`config.pairs`).

A pair trains on the same packed sequences under two objectives, each with a loss weight. The default pairs
are MIR (arXiv 2606.06888) and the loss of Nemotron-Labs-Diffusion.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dualsm.objectives.example import Example, Row, SpecialIds
from dualsm.objectives.registry import OBJECTIVES, WEIGHT
from dualsm.process.errors import UserError


class Member(NamedTuple):
    """An objective of an entry.

    Attributes:
      name: name in metrics, "causal" or, in a pair, "mir/causal".
      objective: name of the objective.
      options: options of the objective, without `weight`.
      weight: factor on the loss.
    """

    name: str
    objective: str
    options: Mapping[str, Any]
    weight: float


class Entry(NamedTuple):
    """An entry of the mixture: one member, or two members that train on the same sequences.

    Attributes:
      name: name of the objective or pair.
      members: its members.
      source: name of the source that the entry belongs to; "" in a run without `config.sources`.
    """

    name: str
    members: tuple[Member, ...]
    source: str = ""

    @property
    def rows(self) -> int:
        """Rows of the batch per sequence."""
        return len(self.members)


def default_pairs() -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the default of `config.pairs`: pair -> objective -> option -> value.

    Each objective has a `weight`. Options that a pair does not set are those of `config.objectives`.
    """
    return {
        "mir": {
            "causal": {"weight": 1.0},
            "masked_input_causal": {"weight": 0.4, "low": 0.0, "high": 0.5},
        },
        "nemotron": {"causal": {"weight": 1.0}, "masked_diffusion": {"weight": 0.3}},
    }


def default_member_options(pairs: Mapping[str, Mapping]) -> dict[str, Any]:
    """Returns a value of the right type for every key of `config.pairs`, by dotted key.

    Raises:
      UserError: if a pair does not consist of two objectives with a weight and with options that exist.
    """
    found = {}
    for pair, members in pairs.items():
        where = f"config.pairs.{pair}"
        if pair in OBJECTIVES or not pair.isidentifier():
            raise UserError(
                f"{where}: choose another name, a Python identifier that is not an objective's name"
            )
        if not isinstance(members, Mapping) or len(members) != 2 or not OBJECTIVES.keys() >= set(members):
            listed = ", ".join(members) if isinstance(members, Mapping) else repr(members)
            raise UserError(
                f"{where} has {listed or 'no objectives'}; set exactly two of {', '.join(OBJECTIVES)}"
            )
        for name, options in members.items():
            known = {"weight": 1.0} | OBJECTIVES[name].defaults
            if not isinstance(options, Mapping) or not known.keys() >= set(options):
                raise UserError(
                    f"{where}.{name}={options!r} must set weight and options of {', '.join(known)}"
                )
            if "weight" not in options:
                raise UserError(f"{where}.{name} has no weight; set {where}.{name}.weight")
            found |= {f"pairs.{pair}.{name}.{key}": known[key] for key in options}
    return found


def check_pairs(config: Mapping) -> None:
    """Raises `UserError`, naming the key, for invalid options of pairs whose keys and types are valid."""
    for pair, members in config["pairs"].items():
        for name, options in members.items():
            where, row = f"config.pairs.{pair}.{name}", OBJECTIVES[name]
            for key, value in options.items():
                if key != "weight" and row.options[key].defines_task:  # validation scores one task
                    raise UserError(
                        f"{where}.{key} defines the task, which validation must know; set "
                        f"config.objectives.{name}.{key}"
                    )
                (WEIGHT if key == "weight" else row.options[key]).rule.check(f"{where}.{key}", value)
            if message := row.check({**config["objectives"][name], **options}):
                raise UserError(f"{where}: {message}")


def entry(name: str, config: Mapping) -> Entry:
    """Returns the entry of an objective or of a pair, with the options of the config."""
    if name in OBJECTIVES:
        return Entry(name, (_member(name, name, config["objectives"][name]),))
    members = config["pairs"][name]
    return Entry(
        name,
        tuple(
            _member(
                f"{name}/{objective}", objective, {**config["objectives"][objective], **members[objective]}
            )
            for objective in OBJECTIVES  # the order of a dict is lost when the config is saved
            if objective in members
        ),
    )


def _member(name: str, objective: str, options: Mapping) -> Member:
    return Member(
        name, objective, {k: v for k, v in options.items() if k != "weight"}, options.get("weight", 1.0)
    )


def members_of(entries: Sequence[Entry]) -> list[Member]:
    """Returns the members of all entries, in order."""
    return [member for entry in entries for member in entry.members]


def bind_members(members: Sequence[Member], special: SpecialIds) -> list[Callable[[Row, jax.Array], Example]]:
    """Returns the objectives of the members as functions of (row, key), with their options bound."""
    return [
        functools.partial(OBJECTIVES[member.objective], special=special, **member.options)
        for member in members
    ]
