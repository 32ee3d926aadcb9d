"""The two axes of the surface: repetitions by octaves, alpha on a scale that opens both ends."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

# Half of the finest step of the paper's grid. It keeps 0 and 1 finite, and as far from 1/256 and 255/256 as
# these are from 1/64 and 63/64.
MARGIN = 1 / 512


def alpha_scale(alpha):
    """log2((alpha + m) / (1 - alpha + m)) with m = 1/512: a logit that is finite on all of [0, 1].

    0 and 1 lie at -9.0 and 9.0, 1/256 at -7.4, 1/64 at -5.8, 1/8 at -2.8, 1/2 at 0.
    """
    alpha = np.asarray(alpha, float)
    return np.log2((alpha + MARGIN) / (1 - alpha + MARGIN))


def alpha_from_scale(place):
    """The inverse of `alpha_scale`."""
    odds = 2.0 ** np.asarray(place, float)
    return (odds * (1 + MARGIN) - MARGIN) / (1 + odds)


def repetition_scale(repetitions):
    """log2(R): a doubling is one step."""
    return np.log2(np.asarray(repetitions, float))


def doublings_outside(repetitions: float, low: float, high: float) -> float:
    """By how many doublings R lies outside [low, high]; 0 inside."""
    octave, first, last = repetition_scale([repetitions, low, high])
    return float(max(octave - last, first - octave, 0))


def _alpha_grid() -> np.ndarray:
    halves = [0, *(k / 2**n for n in range(8, 1, -1) for k in (1, 1.5)), 1 / 2]
    return np.array(halves + [1 - alpha for alpha in reversed(halves[:-1])])


# The alphas that a recommendation chooses from: 0, 1/256, 3/512, 1/128, ... 1/4, 3/8, 1/2 and their mirror
# images. Neighbours are a factor of 4/3 or 3/2 apart in the smaller share.
ALPHAS = _alpha_grid()


def fraction(value: float) -> str:
    """`value` as a person writes it: "1/64" and "63/64" where it is such a fraction, else three digits."""
    value = float(value)  # a Fraction of a NumPy number overflows
    near = Fraction(value).limit_denominator(512)
    power_of_two = near.denominator & (near.denominator - 1) == 0
    return str(near) if power_of_two and abs(near - value) < 1e-6 else f"{value:.3g}"
