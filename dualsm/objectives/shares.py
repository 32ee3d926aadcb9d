"""Shares of the entries of the mixture (objectives and pairs) over the run.

The host computes them before the first step and sends only the objective of each row to the device, so that a
change of the shares never recompiles the train step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dualsm.objectives.mixture import check_shares
from dualsm.objectives.pairs import Entry, entry, members_of
from dualsm.objectives.registry import OBJECTIVES, check_mode_tokens
from dualsm.objectives.share_schedule import Point, schedule_points, shares_of_steps
from dualsm.objectives.sources import Source, source_shares, trained_sources
from dualsm.process.errors import UserError

_EXAMPLE = "0.5 causal=0.25 masked_diffusion=0.75; 1 masked_diffusion=1"


def points(config: ConfigDict, source: Source | None = None) -> list[Point]:
    """Returns the points of the schedule of a source's mixture; the first is the mixture at progress 0.

    A source's own mixture is constant.

    Raises:
      UserError: if `config.mixture` or a point of `config.mixture_schedule.path` is not a distribution over
        objectives and pairs, or if the points are not in order.
    """
    if source and source.mixture:
        return [Point(0.0, source.mixture)]
    check = functools.partial(check_shares, pairs=[*config.pairs])
    return schedule_points(
        config.mixture, config.mixture_schedule, "config.mixture_schedule", _EXAMPLE, check
    )


def check_mixture(config: ConfigDict) -> None:
    """Raises `UserError` for an invalid mixture or schedule, and for objectives that cannot be mixed."""
    points(config)  # also if every source has a mixture of its own
    check_mode_tokens(trained_objectives(config))
    if config.batch_size % 2 and (pairs := [e.name for e in trained_entries(config) if e.rows > 1]):
        raise UserError(
            f"config.batch_size={config.batch_size} must be even, because the pair {pairs[0]} takes two rows "
            "per sequence"
        )


def source_entries(config: ConfigDict, source: Source) -> list[Entry]:
    """Returns the trained entries of a source: objectives in the table's order, then pairs."""
    path = points(config, source)
    return [
        entry(name, config)._replace(source=source.name)
        for name in [*OBJECTIVES, *sorted(config.pairs)]
        if any(point.shares.get(name, 0) > 0 for point in path)
    ]


def trained_entries(config: ConfigDict) -> list[Entry]:
    """Returns the entries with a positive share at some step, source by source."""
    return [entry for source in trained_sources(config) for entry in source_entries(config, source)]


def trained_objectives(config: ConfigDict) -> list[str]:
    """Returns the objectives that are trained at some step, also in pairs, in the order of `OBJECTIVES`."""
    trained = {member.objective for member in members_of(trained_entries(config))}
    return [name for name in OBJECTIVES if name in trained]


def step_shares(config: ConfigDict, names: Sequence[str], source: Source | None = None) -> np.ndarray:
    """Returns each named entry's share of the rows of a source at each step, float64 [S, E]."""
    return shares_of_steps(points(config, source), config.mixture_schedule.name, config.steps, names)


class SourceShares(NamedTuple):
    """A source, its entries, and their shares at each step.

    Attributes:
      source: the source.
      entries: trained entries of the source.
      share_S: the source's share of the rows of each step.
      within_SxE: each entry's share of the rows of the source.
    """

    source: Source
    entries: list[Entry]
    share_S: np.ndarray
    within_SxE: np.ndarray

    @property
    def share_SxE(self) -> np.ndarray:
        """Each entry's share of the rows of each step."""
        return self.share_S[:, None] * self.within_SxE


def shares_by_source(config: ConfigDict) -> list[SourceShares]:
    """Returns the shares of all sources and of their entries, in the order of `trained_entries`."""
    sources, found = trained_sources(config), []
    for source, share_S in zip(sources, source_shares(config, sources).T, strict=True):
        entries = source_entries(config, source)
        within_SxE = step_shares(config, [entry.name for entry in entries], source)
        found.append(SourceShares(source, entries, share_S, within_SxE))
    return found


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
