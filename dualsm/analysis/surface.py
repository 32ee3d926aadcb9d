"""A Gaussian process over score(R, alpha), and the recommendations that follow from it.

The kernel is the paper's (arXiv 2512.14549): an anisotropic Matern 3/2 kernel plus white noise, over log2(R)
and the scale of alpha in `scales`. The process is fitted to a standardized *value*; higher is better. The
value of a task score is the score. The value of a loss is exp(best - loss), the geometric mean of the token
probabilities relative to that of the best cell. It is in (0, 1], so that the huge loss of a diverged cell
does not distort the surface between the other cells.

Shape letters: C cells, A alphas of a grid, G repetitions of a grid, M samples.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np

from dualsm.analysis.analysis_errors import TooFewCells, analysis_extra
from dualsm.analysis.scales import ALPHAS, alpha_scale, doublings_outside, repetition_scale

FEWEST_CELLS = 4  # minimum for a fit
ENOUGH_CELLS, ENOUGH_VALUES = 12, 3  # for a reliable fit: number of cells, distinct R and distinct alphas
CREDIBLE = 0.8  # probability inside the interval of the best alpha
SAMPLES = 4000  # of the posterior; the standard error of a probability is below 0.01
# The value of a loss ln 20 (about three nats) above the best one. The surface does not resolve higher losses.
LEAST_VALUE = 0.05


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and a standard deviation, in units of the score.

    If `at_least` is set, `mean` is a lower bound and `sd` is None: the loss, or one of the two losses of a
    difference, is higher than the surface resolves.
    """

    mean: float
    sd: float | None
    at_least: bool = False


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The best alpha at one number of repetitions, with its uncertainty.

    Attributes:
      repetitions: R.
      alpha: share of causal rows with the best expected score.
      interval: credible interval of the best alpha, with a probability of at least `CREDIBLE`.
      tried_alphas: the smallest and the largest alpha that was tried.
      score: expected score at `alpha`; `sd` excludes the noise of a single run.
      gain_over_causal: improvement over alpha = 1; positive is better, for losses too. None if alpha = 1 was
        not tried, or if the surface resolves neither of the two losses.
      gain_over_masked: improvement over alpha = 0.
      doublings_outside: distance of R from the tried range, in doublings; 0 inside the range.
      few_cells: counts that are too low for a reliable fit, as text; "" if all suffice.
    """

    repetitions: float
    alpha: float
    interval: tuple[float, float]
    tried_alphas: tuple[float, float]
    score: Estimate
    gain_over_causal: Estimate | None
    gain_over_masked: Estimate | None
    doublings_outside: float
    few_cells: str


@dataclasses.dataclass(frozen=True)
class Surface:
    """A fitted surface.

    Attributes:
      process: scikit-learn regressor of the standardized value, without white noise.
      mean, scale: value = mean + scale * standardized value.
      noise_sd: standard deviation of a single run around the surface, in units of the score.
      lower_is_better: True for a loss.
      best: lowest loss of a cell; 0 for task scores.
      repetitions_C, alpha_C: R and alpha of the fitted cells.
    """

    process: object
    mean: float
    scale: float
    noise_sd: float
    lower_is_better: bool
    best: float
    repetitions_C: np.ndarray
    alpha_C: np.ndarray

    def value(self, repetitions: float, alpha_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean [A] and covariance [A, A] of the value at one R."""
        points_Ax2 = _points(np.full(len(alpha_A), repetitions), alpha_A)
        mean_A, covariance_AxA = self.process.predict(points_Ax2, return_cov=True)
        return self.mean + self.scale * mean_A, self.scale**2 * covariance_AxA

    def posterior(self, repetitions: float, alpha_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean [A] and covariance [A, A] of the score at one R.

        The covariance of a loss is a first-order approximation. A loss that the surface does not resolve is
        returned as ln(1 / LEAST_VALUE) above the best cell.
        """
        mean_A, covariance_AxA = self.value(repetitions, alpha_A)
        if not self.lower_is_better:
            return mean_A, covariance_AxA
        mean_A = mean_A.clip(LEAST_VALUE)
        return self.best - np.log(mean_A), covariance_AxA / np.outer(mean_A, mean_A)

    def grid(self, repetitions_G: Sequence[float], alpha_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean and standard deviation of the score at all pairs of R and alpha, [A, G] each."""
        columns = [self.posterior(repetitions, alpha_A) for repetitions in repetitions_G]
        mean_AxG = np.stack([mean_A for mean_A, _ in columns], axis=1)
        return mean_AxG, np.sqrt(np.stack([np.diag(c_AxA).clip(0) for _, c_AxA in columns], axis=1))

    def alphas(self) -> np.ndarray:
        """Returns the candidate alphas: the tried ones, and those of `scales.ALPHAS` within their range."""
        outside_A = ALPHAS.clip(self.alpha_C.min(), self.alpha_C.max()) != ALPHAS
        return np.union1d(ALPHAS[~outside_A], self.alpha_C)

    def probability_best(self, repetitions: float, alpha_A: np.ndarray) -> np.ndarray:
        """Returns the probability that each alpha of a grid has the best score of the grid at R, [A].

        The probabilities are frequencies among joint samples of the posterior, drawn with a fixed seed.
        """
        samples_MxA = _samples(*self.value(repetitions, alpha_A))
        return np.bincount(samples_MxA.argmax(1), minlength=len(alpha_A)) / len(samples_MxA)

    def recommend(self, repetitions: float) -> Recommendation:
        """Returns the best of `alphas()` at `repetitions`, with its uncertainty."""
        alpha_A = self.alphas()
        value_A, value_covariance_AxA = self.value(repetitions, alpha_A)
        best = int(value_A.argmax())
        mean_A, covariance_AxA = self.posterior(repetitions, alpha_A)
        unresolved_A = (value_A < LEAST_VALUE) & self.lower_is_better
        sign = -1 if self.lower_is_better else 1
        low, high = shortest_interval(self.probability_best(repetitions, alpha_A), best, CREDIBLE)

        def gain_over(alpha: float) -> Estimate | None:
            other = np.flatnonzero(alpha_A == alpha)
            if not len(other) or unresolved_A[best]:
                return None
            if unresolved_A[other[0]]:
                sd = math.sqrt(max(value_covariance_AxA[other[0], other[0]], 0))
                lowest_loss = self.best - math.log(max(value_A[other[0]] + 2 * sd, LEAST_VALUE))
                return Estimate(max(float(lowest_loss - mean_A[best]), 0.0), None, at_least=True)
            contrast_A = np.zeros(len(alpha_A))
            contrast_A[best] += sign
            contrast_A[other] -= sign
            return _estimate(contrast_A, mean_A, covariance_AxA)

        score = _estimate(np.eye(len(alpha_A))[best], mean_A, covariance_AxA)
        return Recommendation(
            repetitions=repetitions,
            alpha=float(alpha_A[best]),
            interval=(float(alpha_A[low]), float(alpha_A[high])),
            tried_alphas=(float(alpha_A[0]), float(alpha_A[-1])),
            score=Estimate(score.mean, None, at_least=True) if unresolved_A[best] else score,
            gain_over_causal=gain_over(1.0),
            gain_over_masked=gain_over(0.0),
            doublings_outside=doublings_outside(
                repetitions, self.repetitions_C.min(), self.repetitions_C.max()
            ),
            few_cells=self.few_cells(),
        )

    def few_cells(self) -> str:
        """Lists the counts that are too low for a reliable fit, as text; "" if all suffice."""
        counts = {
            "cells": (len(self.alpha_C), ENOUGH_CELLS),
            "numbers of repetitions": (len(np.unique(self.repetitions_C)), ENOUGH_VALUES),
            "alphas": (len(np.unique(self.alpha_C)), ENOUGH_VALUES),
        }
        return ", ".join(f"{count} {name}" for name, (count, needed) in counts.items() if count < needed)


def fit_surface(
    repetitions_C: Sequence[float],
    alpha_C: Sequence[float],
    score_C: Sequence[float],
    *,
    lower_is_better: bool,
    restarts: int = 8,
) -> Surface:
    """Fits the surface to cells; each seed is a separate cell.

    Args:
      repetitions_C: R of each cell, at least 1.
      alpha_C: share of causal rows of each cell, in [0, 1].
      score_C: finite scores.
      lower_is_better: True for a loss.
      restarts: random restarts of the kernel's hyperparameter search; the seed is fixed.

    Raises:
      TooFewCells: if there are fewer than `FEWEST_CELLS` cells or fewer than two alphas.
      UserError: if scikit-learn is not installed.
    """
    if len(score_C) < FEWEST_CELLS or len(set(alpha_C)) < 2:
        raise TooFewCells(
            f"a surface needs at least {FEWEST_CELLS} finished cells with different alphas; there are "
            f"{len(score_C)} cells of {len(set(alpha_C))} alphas"
        )
    with analysis_extra():
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    repetitions_C, alpha_C, score_C = (np.asarray(a, float) for a in (repetitions_C, alpha_C, score_C))
    best = float(score_C.min()) if lower_is_better else 0.0
    value_C = np.exp(best - score_C) if lower_is_better else score_C
    mean, scale = float(value_C.mean()), float(value_C.std()) or 1.0
    points_Cx2, target_C = _points(repetitions_C, alpha_C), (value_C - mean) / scale
    # Length scales are in doublings of R and on the alpha scale (18 from 0 to 1); the target has variance 1.
    smooth = ConstantKernel(1.0, (0.05, 50)) * Matern([4, 6], [(0.5, 50), (0.5, 100)], nu=1.5)
    kernel = smooth + WhiteKernel(1e-2, (1e-5, 2))
    search = GaussianProcessRegressor(kernel, n_restarts_optimizer=restarts, random_state=0)
    with warnings.catch_warnings():  # a hyperparameter at its bound is acceptable
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(points_Cx2, target_C)
    # scikit-learn includes the white noise in covariances; this process has the same kernel without noise.
    noise = search.kernel_.k2.noise_level
    process = GaussianProcessRegressor(search.kernel_.k1, alpha=noise, optimizer=None)
    process.fit(points_Cx2, target_C)
    # The noise of a loss is the relative noise of its value.
    unit = math.sqrt(np.mean(value_C**2)) if lower_is_better else 1.0
    noise_sd = scale * math.sqrt(noise) / unit
    return Surface(process, mean, scale, noise_sd, lower_is_better, best, repetitions_C, alpha_C)


def shortest_interval(probability_A: np.ndarray, inside: int, level: float) -> tuple[int, int]:
    """Returns the first and last index of the shortest interval with `inside` and a probability of `level`.

    Among equally short intervals, the most probable one is returned.
    """
    total_A1 = np.concatenate([[0], np.cumsum(probability_A)])
    runs = [
        (last - first, -(total_A1[last + 1] - total_A1[first]), first, last)
        for first in range(inside + 1)
        for last in range(inside, len(probability_A))
        if total_A1[last + 1] - total_A1[first] >= level - 1e-9
    ]
    _, _, first, last = min(runs)
    return first, last


def _estimate(weight_A, mean_A, covariance_AxA) -> Estimate:
    """Returns the estimate of a weighted sum of scores."""
    return Estimate(float(weight_A @ mean_A), math.sqrt(max(weight_A @ covariance_AxA @ weight_A, 0)))


def _points(repetitions, alpha) -> np.ndarray:
    return np.stack([repetition_scale(repetitions), alpha_scale(alpha)], axis=-1)


def _samples(mean_A: np.ndarray, covariance_AxA: np.ndarray) -> np.ndarray:
    """Draws `SAMPLES` samples of a normal distribution with a fixed seed, [M, A]."""
    variance_A, axes_AxA = np.linalg.eigh(covariance_AxA)
    root_AxA = axes_AxA * np.sqrt(variance_A.clip(0))
    return mean_A + np.random.default_rng(0).standard_normal((SAMPLES, len(mean_A))) @ root_AxA.T
