"""Standard errors of ratios of sums over documents, by the bootstrap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
_MAX_UNITS = 10_000  # more documents are resampled in groups of neighbors
_SEED = 20251214


def bootstrap_stderr(
    sums_NxS: np.ndarray, *statistics: Callable[[np.ndarray], np.ndarray], resamples: int = RESAMPLES
) -> list[float | None]:
    """Returns the standard errors of statistics of sums over documents, from resampled documents.

    Documents count as independent. The seed is fixed, so equal sums have equal errors. The standard deviation
    over resamples is scaled by sqrt(n / (n - 1)): for a mean of n values, this gives the sample standard
    deviation over sqrt(n).

    Args:
      sums_NxS: S sums of each document; documents in random order.
      statistics: each maps the sums of R resamples, [R, S], to its value, [R]. Resamples without a finite
        value are left out.
      resamples: number of resamples.

    Returns:
      The standard error of each statistic; None for fewer than two documents or finite resamples.
    """
    size = min(len(sums_NxS), _MAX_UNITS)
    if size < 2:
        return [None] * len(statistics)
    sums_UxS = np.add.reduceat(sums_NxS, np.arange(size) * len(sums_NxS) // size, axis=0)
    rng = np.random.default_rng(_SEED)
    counts = (np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(resamples))
    sums_RxS = np.array([count_U @ sums_UxS for count_U in counts])
    return [_stderr(statistic, sums_RxS, size) for statistic in statistics]


def _stderr(statistic: Callable[[np.ndarray], np.ndarray], sums_RxS: np.ndarray, size: int) -> float | None:
    with np.errstate(divide="ignore", invalid="ignore"):
        values_R = statistic(sums_RxS)
    values_R = values_R[np.isfinite(values_R)]
    return float(values_R.std() * np.sqrt(size / (size - 1))) if len(values_R) > 1 else None
