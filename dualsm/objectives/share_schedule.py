"""Schedules of shares over the run, for the entries of the mixture and for the sources of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dualsm.process.errors import UserError

SCHEDULES = ("constant", "linear", "steps")


class Point(NamedTuple):
    """The shares at a point of the schedule; progress is the completed fraction of the steps."""

    progress: float
    shares: Mapping[str, float]


def schedule_points(
    shares: Mapping[str, float],
    schedule: Mapping[str, str],
    where: str,
    example: str,
    check: Callable[[Mapping[str, float]], None],
) -> list[Point]:
    """Returns the points of a schedule; the first is `shares` at progress 0.

    Args:
      shares: shares at the start.
      schedule: `name`, one of `SCHEDULES`, and `path`, the later points.
      where: key of the schedule, for messages.
      example: an example of a path, for messages.
      check: function that raises `UserError` unless the shares are a distribution over known names.

    Raises:
      UserError: if the shares of a point are invalid, or if the points are not in order.
    """
    check(shares)
    path = [Point(0.0, dict(shares))]
    if schedule["name"] == "constant":
        if schedule["path"]:
            raise UserError(
                f"{where}.path={schedule['path']!r} has no effect with the schedule 'constant'; set "
                f"{where}.name to linear or steps, or clear the path"
            )
        return path
    for text in filter(str.strip, schedule["path"].split(";")):
        point = _point(text.strip(), where, check)
        if not path[-1].progress < point.progress <= 1:
            raise UserError(
                f"{where}.path: progress {point.progress:g} must be above {path[-1].progress:g} and at most 1"
            )
        path.append(point)
    if len(path) == 1:
        raise UserError(f"{where}.name={schedule['name']} needs a path, such as '{example}'")
    return path


def _point(text: str, where: str, check: Callable[[Mapping[str, float]], None]) -> Point:
    progress, *shares = text.split()
    try:
        parts = [share.split("=") for share in shares]
        point = Point(float(progress), {name: float(value) for name, value in parts})
    except ValueError as error:
        raise UserError(f"{where}.path: cannot parse {text!r}; write 'PROGRESS NAME=SHARE ...'") from error
    if len(point.shares) < len(parts):
        raise UserError(f"{where}.path: a name occurs twice in {text!r}; remove one")
    try:
        check(point.shares)
    except UserError as error:
        raise UserError(f"{where}.path at {progress}: {error}") from error
    return point


def shares_of_steps(path: Sequence[Point], name: str, steps: int, names: Sequence[str]) -> np.ndarray:
    """Returns the share of each name at each step, float64 [S, E]; sums to 1 at each step.

    The schedule is evaluated at the middle of each step, so that the mean share of a linear run is the mean
    of its end points. "linear" interpolates between the points and is constant after the last one; "steps"
    keeps the shares of each point until the next one.

    Args:
      path: points of the schedule.
      name: one of `SCHEDULES`.
      steps: S.
      names: all names with a share at some point.
    """
    progress_S = (np.arange(steps) + 0.5) / steps
    known_K = [point.progress for point in path]
    shares_KxE = np.array([[point.shares.get(name, 0.0) for name in names] for point in path])
    if name == "linear":
        return np.stack([np.interp(progress_S, known_K, shares_K) for shares_K in shares_KxE.T], axis=1)
    return shares_KxE[np.searchsorted(known_K, progress_S, side="right") - 1]
