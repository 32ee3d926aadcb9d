"""The axes of the surface: log2(R), and a logit scale of alpha that is finite at 0 and 1."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

# Half of the finest step of the paper's grid. It keeps 0 and 1 finite. Their distance from 1/256 and 255/256
# is close to the distance between 1/256 and 1/64.
MARGIN = 1 / 512
NEGLIGIBLE_DOUBLINGS = 0.05  # smaller distances would be printed as 0.0


def alpha_scale(alpha):
    """Returns log2((alpha + m) / (1 - alpha + m)) with m = 1/512, a logit that is finite on [0, 1].

    It maps 0 to -9.0, 1/256 to -7.4, 1/64 to -5.8, 1/8 to -2.8, 1/2 to 0 and 1 to 9.0.
    """
    alpha = np.asarray(alpha, float)
    return np.log2((alpha + MARGIN) / (1 - alpha + MARGIN))


def alpha_from_scale(position):
    """Inverts `alpha_scale`."""
    odds = 2.0 ** np.asarray(position, float)
    return (odds * (1 + MARGIN) - MARGIN) / (1 + odds)


def repetition_scale(repetitions):
    """Returns log2(R)."""
    return np.log2(np.asarray(repetitions, float))


def doublings_outside(repetitions: float, low: float, high: float) -> float:
    """Returns the distance of R from the range [low, high] in doublings; 0 inside the range."""
    doublings, first, last = repetition_scale([repetitions, low, high])
    return float(max(doublings - last, first - doublings, 0))


def _alpha_grid() -> np.ndarray:
    halves = [0, *(k / 2**n for n in range(8, 1, -1) for k in (1, 1.5)), 1 / 2]
    return np.array(halves + [1 - alpha for alpha in reversed(halves[:-1])])


# Candidates for a recommendation: 0, 1/256, 3/512, 1/128, ... 1/4, 3/8, 1/2 and 1 minus each of these. The
# smaller share of the mixture grows by a factor of 4/3 or 3/2 from one candidate to the next.
ALPHAS = _alpha_grid()


def fraction(value: float) -> str:
    """Formats a share as a fraction such as "63/64", or with 3 digits if the denominator is not 2^n."""
    value = float(value)  # a Fraction of a NumPy number can overflow
    nearest = Fraction(value).limit_denominator(512)
    power_of_two = nearest.denominator & (nearest.denominator - 1) == 0
    return str(nearest) if power_of_two and abs(nearest - value) < 1e-6 else f"{value:.3g}"
