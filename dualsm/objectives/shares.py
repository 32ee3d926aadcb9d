"""Shares of the objectives as functions of training progress.

They are read on the host, before the first step, and reach the device as the objective of each row: changing
them never recompiles anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dualsm.objectives.mixture import OBJECTIVES, check_shares
from dualsm.process.errors import UserError

SCHEDULES = ("constant", "linear", "steps")


class Point(NamedTuple):
    """Shares that hold, or are reached, at a progress in [0, 1]."""

    progress: float
    shares: Mapping[str, float]


def points(config: ConfigDict) -> list[Point]:
    """The points that a run's shares go through; the first is `config.mixture` at progress 0.

    Raises:
      UserError: when `config.mixture` or a point of `config.mixture_schedule.path` is no distribution over
        objectives, or the points do not come in order.
    """
    check_shares(config.mixture)
    path = [Point(0.0, dict(config.mixture))]
    if config.mixture_schedule.name == "constant":
        if config.mixture_schedule.path:
            raise UserError("config.mixture_schedule.path is set but its name is 'constant'")
        return path
    for text in filter(str.strip, config.mixture_schedule.path.split(";")):
        point = _point(text.strip())
        if not path[-1].progress < point.progress <= 1:
            raise UserError(
                f"config.mixture_schedule.path: progress {point.progress:g} must lie above "
                f"{path[-1].progress:g} and not above 1"
            )
        path.append(point)
    if len(path) == 1:
        raise UserError(
            f"config.mixture_schedule.name={config.mixture_schedule.name} needs a path, such as "
            "'0.5 causal=0.25 masked_diffusion=0.75; 1 masked_diffusion=1'"
        )
    return path


def _point(text: str) -> Point:
    progress, *shares = text.split()
    try:
        pairs = [share.split("=") for share in shares]
        point = Point(float(progress), {name: float(value) for name, value in pairs})
    except ValueError as error:
        raise UserError(
            f"config.mixture_schedule.path: {text!r} does not read 'PROGRESS OBJECTIVE=SHARE ...'"
        ) from error
    try:
        check_shares(point.shares)
    except UserError as error:
        raise UserError(f"config.mixture_schedule.path at {progress}: {error}") from error
    return point


def trained_objectives(config: ConfigDict) -> list[str]:
    """The objectives that ever have a share of the rows, in the order of their definition."""
    path = points(config)
    return [name for name in OBJECTIVES if any(point.shares.get(name, 0) > 0 for point in path)]


def step_shares(config: ConfigDict, names: Sequence[str]) -> np.ndarray:
    """Share of each objective at each step, float64 [S, J]; each step's sum to 1.

    A step counts with its middle, so that the mean share over a whole linear run is the mean of its ends.
    "linear" goes straight from point to point and stays at the last; "steps" holds each point's shares
    until the next.
    """
    path = points(config)
    progress_S = (np.arange(config.steps) + 0.5) / config.steps
    known_K = [point.progress for point in path]
    shares_KxJ = np.array([[point.shares.get(name, 0.0) for name in names] for point in path])
    if config.mixture_schedule.name == "linear":
        return np.stack([np.interp(progress_S, known_K, shares_K) for shares_K in shares_KxJ.T], axis=1)
    return shares_KxJ[np.searchsorted(known_K, progress_S, side="right") - 1]


def set_phases(config: ConfigDict, phases: Sequence[tuple[float, Mapping[str, float]]]) -> None:
    """Makes a run go through phases with shares of their own, as AntLM alternates whole epochs
    (arXiv 2411.03275) and others go from causal to masked rows (arXiv 2507.00994).

    Args:
      config: is changed.
      phases: (length, shares) each; lengths in any unit, such as epochs.
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
