"""Checks of the objectives' options, before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping

from dualsm.objectives.ahead import FARTHEST
from dualsm.objectives.masked_diffusion import NARROWEST, TIMES
from dualsm.objectives.span_denoising import DENOISERS
from dualsm.process.errors import UserError

_MODES = "".join(dict.fromkeys(denoiser.mode for denoiser in DENOISERS))
_SHARE = (lambda v: 0 <= v <= 1, "must lie in [0, 1]")
_RULES = {
    "weight": (lambda v: v >= 0, "must not be negative"),
    "clip": (lambda v: v >= 0, "must not be negative"),
    "distance": (lambda v: 1 <= v <= FARTHEST, f"must lie in 1..{FARTHEST}"),
    "modes": (
        lambda v: v and set(v) <= set(_MODES) and len(set(v)) == len(v),
        f"must be letters of {_MODES}",
    ),
    "span": (lambda v: v >= 1, "must be at least 1"),
    "time": (lambda v: v in TIMES, f"must be one of {', '.join(TIMES)}"),
    "width": (lambda v: v >= 0.05, "must be at least 0.05"),
} | dict.fromkeys(("first", "last", "low", "high", "random", "keep"), _SHARE)


# What the model was taught to read, rather than how its training rows were drawn.
_LANGUAGE = ("distance", "modes", "shifted")


def valid_options(options: Mapping[str, Mapping]) -> dict[str, dict]:
    """The options under which objectives are validated: the defaults, so that all runs are scored on the
    same task, but for what a run's rows look like as such (an unshifted head, modes it was taught).

    Args:
      options: `config.objectives`.
    """
    return {name: {k: v for k, v in values.items() if k in _LANGUAGE} for name, values in options.items()}


def check_options(options: Mapping[str, Mapping]) -> None:
    """Raises `UserError`, naming the key, for options that an objective cannot have.

    Args:
      options: `config.objectives`, objective -> option -> value, with all keys and types right.
    """
    for name, values in options.items():
        where = f"config.objectives.{name}"
        for key, value in values.items():
            holds, rule = _RULES.get(key, (lambda _: True, ""))
            if not holds(value):
                raise UserError(f"{where}.{key}={value} {rule}")
        if values.get("low", 0) > values.get("high", 1):
            raise UserError(f"{where}: low={values['low']} is above high={values['high']}")
        if values.get("random", 0) + values.get("keep", 0) > 1:
            raise UserError(f"{where}: random and keep must not exceed 1 together")
        if values.get("time") == "bell" and values["importance"] and values["width"] < NARROWEST:
            raise UserError(
                f"{where}.width={values['width']} is too narrow for importance=True, as the loss would lie "
                f"below the bound; use at least {NARROWEST}, or {where}.importance=False"
            )
