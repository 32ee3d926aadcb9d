"""Parsing of lm-evaluation-harness's `--model_args`; the harness itself splits them at every comma."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Sequence

from dualsm.process.errors import UserError
from dualsm.process.paths import user_path


def read_masks(masks: int | str | Sequence[int]) -> tuple[int, ...]:
    """Parses numbers of masks from 1, "1+4" or [1, 4]. Raises `UserError` for anything else."""
    is_text = isinstance(masks, int | str)
    parts = str(masks).strip("[]").replace(",", "+").split("+") if is_text else list(masks)
    try:
        return tuple(int(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise UserError(f"--model_args: masks={masks!r} must look like 1, 1+4 or [1,4]") from error


def read_integer(name: str, value: int | str) -> int:
    """Parses an integer argument. Raises `UserError` if it is not an integer."""
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"--model_args: {name}={value!r} must be an integer") from error


def read_boolean(name: str, value: bool | str) -> bool:
    """Parses true or false, in any case. Raises `UserError` for anything else."""
    found = {"true": True, "false": False}.get(str(value).lower())
    if found is None:
        raise UserError(f"--model_args: {name}={value!r} must be true or false")
    return found


def read_model_args(text: str) -> dict[str, str]:
    """Parses `key=value,key=value`, where values may contain commas and equals signs.

    The value of `workdir` extends as far as it names an existing folder, such as a sweep's
    `alpha=0.5,seed=1`. Any other value extends to the next part that contains an equals sign, as in
    `masks=[1,4]`.
    """
    parts, arguments = text.strip(", ").split(","), {}
    while any(parts):
        key, _, _ = parts[0].partition("=")
        size = next((i for i, part in enumerate(parts[1:], 1) if "=" in part), len(parts))
        if key == "workdir":
            folders = (n for n in range(len(parts), 0, -1) if user_path(_value(parts[:n])).is_dir())
            size = next(folders, size)
        arguments[key] = _value(parts[:size])
        del parts[:size]
    return arguments


def _value(parts: Sequence[str]) -> str:
    return ",".join(parts).partition("=")[2]


def command_line_as_json(argv: Sequence[str]) -> list[str]:
    """Returns lm_eval's command line with this model's arguments as JSON, which lm_eval does not split."""
    found, argv = [], list(argv)
    while argv:
        flag, is_joined, value = argv.pop(0).partition("=")
        found.append(flag + is_joined + value)
        if flag not in ("--model_args", "-a"):
            continue
        values = [value] if is_joined else []
        while not is_joined and argv and not argv[0].startswith("-"):
            values.append(argv.pop(0))
        read = functools.reduce(operator.or_, map(read_model_args, values), {})
        if "workdir" in read:
            values = [json.dumps(read)]
        found[-1:] = [flag, *values]
    return found
