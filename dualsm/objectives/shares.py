"""Shares of the entries of the mixture (objectives and pairs) over the run.

The host computes them before the first step and sends only the objective of each row to the device, so that a
change of the shares never recompiles the train step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dualsm.objectives.mixture import check_shares
from dualsm.objectives.pairs import Entry, entry, members_of
from dualsm.objectives.registry import OBJECTIVES, check_mode_tokens
from dualsm.process.errors import UserError

SCHEDULES = ("constant", "linear", "steps")


class Point(NamedTuple):
    """The shares at a point of the schedule; progress is the completed fraction of the steps."""

    progress: float
    shares: Mapping[str, float]


def points(config: ConfigDict) -> list[Point]:
    """Returns the points of the schedule; the first is `config.mixture` at progress 0.

    Raises:
      UserError: if `config.mixture` or a point of `config.mixture_schedule.path` is not a distribution over
        objectives and pairs, or if the points are not in order.
    """
    check_shares(config.mixture, [*config.pairs])
    path = [Point(0.0, dict(config.mixture))]
    if config.mixture_schedule.name == "constant":
        if config.mixture_schedule.path:
            raise UserError(
                f"config.mixture_schedule.path={config.mixture_schedule.path!r} has no effect with the "
                "schedule 'constant'; set config.mixture_schedule.name to linear or steps, or clear the path"
            )
        return path
    for text in filter(str.strip, config.mixture_schedule.path.split(";")):
        point = _point(text.strip(), [*config.pairs])
        if not path[-1].progress < point.progress <= 1:
            raise UserError(
                f"config.mixture_schedule.path: progress {point.progress:g} must be above "
                f"{path[-1].progress:g} and at most 1"
            )
        path.append(point)
    if len(path) == 1:
        raise UserError(
            f"config.mixture_schedule.name={config.mixture_schedule.name} needs a path, such as "
            "'0.5 causal=0.25 masked_diffusion=0.75; 1 masked_diffusion=1'"
        )
    return path


def _point(text: str, pairs: Sequence[str]) -> Point:
    progress, *shares = text.split()
    try:
        parts = [share.split("=") for share in shares]
        point = Point(float(progress), {name: float(value) for name, value in parts})
    except ValueError as error:
        raise UserError(
            f"config.mixture_schedule.path: cannot parse {text!r}; write 'PROGRESS OBJECTIVE=SHARE ...'"
        ) from error
    try:
        check_shares(point.shares, pairs)
    except UserError as error:
        raise UserError(f"config.mixture_schedule.path at {progress}: {error}") from error
    return point


def check_mixture(config: ConfigDict) -> None:
    """Raises `UserError` for an invalid mixture or schedule, and for objectives that cannot be mixed."""
    check_mode_tokens(trained_objectives(config))
    if config.batch_size % 2 and (pairs := [e.name for e in trained_entries(config) if e.rows > 1]):
        raise UserError(
            f"config.batch_size={config.batch_size} must be even, because the pair {pairs[0]} takes two rows "
            "per sequence"
        )


def trained_entries(config: ConfigDict) -> list[Entry]:
    """Returns the entries that have a share at some step: objectives in the table's order, then pairs."""
    path = points(config)
    return [
        entry(name, config)
        for name in [*OBJECTIVES, *sorted(config.pairs)]
        if any(point.shares.get(name, 0) > 0 for point in path)
    ]


def trained_objectives(config: ConfigDict) -> list[str]:
    """Returns the objectives that are trained at some step, also in pairs, in the order of `OBJECTIVES`."""
    trained = {member.objective for member in members_of(trained_entries(config))}
    return [name for name in OBJECTIVES if name in trained]


def step_shares(config: ConfigDict, names: Sequence[str]) -> np.ndarray:
    """Returns the share of each named entry at each step, float64 [S, E]; sums to 1 at each step.

    The schedule is evaluated at the middle of each step, so that the mean share of a linear run is the mean
    of its end points. "linear" interpolates between the points and is constant after the last one; "steps"
    keeps the shares of each point until the next one.
    """
    path = points(config)
    progress_S = (np.arange(config.steps) + 0.5) / config.steps
    known_K = [point.progress for point in path]
    shares_KxE = np.array([[point.shares.get(name, 0.0) for name in names] for point in path])
    if config.mixture_schedule.name == "linear":
        return np.stack([np.interp(progress_S, known_K, shares_K) for shares_K in shares_KxE.T], axis=1)
    return shares_KxE[np.searchsorted(known_K, progress_S, side="right") - 1]


def set_phases(config: ConfigDict, phases: Sequence[tuple[float, Mapping[str, float]]]) -> None:
    """Sets a schedule of phases with different shares.

    AntLM (arXiv 2411.03275) alternates between objectives by epoch; arXiv 2507.00994 trains on causal rows
    first and on masked rows later.

    Args:
      config: modified in place.
      phases: (length, shares) of each phase; the unit of the lengths is arbitrary, such as epochs.
    """
    total = sum(length for length, _ in phases)
    config.mixture = ConfigDict(dict.fromkeys(config.mixture, 0.0) | dict(phases[0][1]))
    done, path = 0.0, []
    for (length, _), (_, shares) in zip(phases, phases[1:], strict=False):
        done += length
        listed = " ".join(f"{name}={float(share)}" for name, share in shares.items())
        path.append(f"{done / total} {listed}")
    config.mixture_schedule.name = "steps" if path else "constant"
    config.mixture_schedule.path = "; ".join(path)
