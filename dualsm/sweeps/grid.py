"""The grid of a sweep: parsing of flags, cells, and their configs."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple
from urllib.parse import quote

from ml_collections import ConfigDict

from dualsm.config import set_alpha
from dualsm.objectives.sources import trained_sources
from dualsm.process.errors import WHERE_KEYS_ARE_LISTED, UserError

Value = int | float | str
ALPHA = "alpha"  # shorthand for the mixture {causal: alpha, masked_diffusion: 1 - alpha}
MAX_NAME_LENGTH = 200  # bytes; file systems allow 255, including suffixes such as ".log"


class Cell(NamedTuple):
    """One run of a sweep: its name, which is also that of its folder, and the config values that it sets."""

    name: str
    values: dict[str, Value]


class GridRule(NamedTuple):
    """Values for the cells that match `where`: for each key, one of the listed values."""

    where: dict[str, list[Value]]
    values: dict[str, Value]


def parse_value(text: str) -> Value:
    """Parses an integer, a float or a fraction such as 1/64; returns other text unchanged."""
    for read in (int, float, lambda t: float(Fraction(t))):
        try:
            return read(text)
        except (ValueError, ArithmeticError):
            pass
    return text


def parse_axis(text: str, flag: str = "--grid") -> tuple[str, list[Value]]:
    """Parses "repetitions=1,4,16". Raises `UserError` if the text is malformed."""
    key, _, listed = text.partition("=")
    values = [value.strip() for value in listed.split(",")]
    if not key.strip() or not all(values):
        raise UserError(f"{flag}: {text!r} is not of the form KEY=VALUE,VALUE,...")
    return key.strip(), [parse_value(value) for value in values]


def parse_axes(texts: Iterable[str]) -> dict[str, list[Value]]:
    """Parses all `--grid` flags. Raises `UserError` if one is malformed or a key occurs twice."""
    axes = [parse_axis(text) for text in texts]
    _check_unique((key for key, _ in axes), "--grid", "list all its values in one --grid")
    return dict(axes)


def parse_cell(text: str, flag: str = "--cell") -> dict[str, Value]:
    """Parses "repetitions=16,steps=120,alpha=1". Raises `UserError` if the text is malformed."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(key.strip() and value.strip() for key, _, value in pairs):
        raise UserError(f"{flag}: {text!r} is not of the form KEY=VALUE,KEY=VALUE,...")
    _check_unique((key.strip() for key, _, _ in pairs), f"{flag}: {text!r}", "give each key once")
    return {key.strip(): parse_value(value.strip()) for key, _, value in pairs}


def _check_unique(keys: Iterable[str], where: str, advice: str) -> None:
    for key, count in Counter(keys).items():
        if count > 1:
            raise UserError(f"{where}: {key!r} is given {count} times; {advice}")


def parse_rule(text: str) -> GridRule:
    """Parses "repetitions=64,128: optimizer.learning_rate=0.005", or raises `UserError`."""
    where, colon, values = text.partition(":")
    if not colon:
        raise UserError(f"--rule: {text!r} is not of the form KEY=VALUE,...: KEY=VALUE,...")
    key, listed = parse_axis(where, "--rule")
    return GridRule({key: listed}, parse_cell(values, "--rule"))


def make_cells(
    axes: Mapping[str, Sequence[Value]],
    rules: Sequence[GridRule] = (),
    more: Sequence[Mapping[str, Value]] = (),
) -> list[Cell]:
    """Returns the cells of all combinations of the axes' values, and of `more`.

    Args:
      axes: config key (or "alpha") -> its values; the last key varies fastest.
      rules: rules for all cells; their values are not part of the names.
      more: values of additional cells.

    Returns:
      The cells without duplicates.
    """
    combinations = [
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()) if axes
    ]
    cells: dict[str, Cell] = {}
    for values in [*combinations, *map(dict, more)]:
        cell = Cell(_name(values), values | _ruled(values, rules))
        cells.setdefault(cell.name, cell)
    return list(cells.values())


def _ruled(values: Mapping[str, Value], rules: Sequence[GridRule]) -> dict[str, Value]:
    ruled: dict[str, Value] = {}
    for rule in rules:
        if all(values.get(key) in listed for key, listed in rule.where.items()):
            ruled |= {key: value for key, value in rule.values.items() if key not in values}
    return ruled


def _name(values: Mapping[str, Value]) -> str:
    """Returns a folder name such as "repetitions=16,alpha=0.125,optimizer.learning_rate=0.01".

    Different values have different names: keys and numbers are written in full, and other characters are
    percent-encoded. A name longer than `MAX_NAME_LENGTH` is truncated and ends in a hash.
    """
    shown = {quote(key, safe=""): quote(_as_text(value), safe="+") for key, value in values.items()}
    name = ",".join(f"{key}={value}" for key, value in shown.items())
    if len(name) <= MAX_NAME_LENGTH:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: MAX_NAME_LENGTH - len(digest) - 1]}~{digest}"


def _as_text(value: Value) -> str:
    """Formats a value with all digits; whole numbers have no decimal point, so that 1 and 1.0 are equal."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def apply(config: ConfigDict, values: Mapping[str, Value]) -> ConfigDict:
    """Returns a copy of `config` with a cell's values.

    Raises:
      UserError: if a key is unknown or a value has the wrong type.
    """
    config = config.copy_and_resolve_references()
    if ALPHA in values:
        if config.sources and all(source.mixture for source in trained_sources(config)):
            raise UserError(
                f"grid value {ALPHA}={values[ALPHA]} has no effect, because every source has its own "
                "mixture; sweep sources.NAME.mixture.OBJECTIVE"
            )
        try:
            set_alpha(config, float(values[ALPHA]))
        except (ValueError, OverflowError) as error:
            raise UserError(f"grid value {ALPHA}={values[ALPHA]!r} is not a number from 0 to 1") from error
    for key, value in values.items():
        if key == ALPHA:
            continue
        *folders, name = key.split(".")
        section = config
        for folder in folders:
            section = section.get(folder) if isinstance(section, ConfigDict) else None
        if not isinstance(section, ConfigDict) or name not in section:
            raise UserError(f"unknown config key {key!r} in the grid; {WHERE_KEYS_ARE_LISTED}")
        try:
            section[name] = value
        except TypeError as error:
            raise UserError(f"grid value {key}={value!r} has the wrong type ({error})") from error
    return config
