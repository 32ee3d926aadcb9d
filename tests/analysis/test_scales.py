"""The axes of the surface, and the formatting of alphas."""

import numpy as np
import pytest

from dualsm.analysis.scales import (
    ALPHAS,
    alpha_from_scale,
    alpha_scale,
    doublings_outside,
    fraction,
    repetition_scale,
)


def test_alpha_scale_is_symmetric_and_finite():
    ends = alpha_scale([0, 1 / 256, 1 / 64])
    np.testing.assert_allclose(alpha_scale([1, 255 / 256, 63 / 64]), -ends)
    assert np.isfinite(ends).all()
    assert np.diff(ends).min() > 1.5  # the ends of the paper's grid are well separated
    assert alpha_scale(0.5) == 0


def test_alpha_scale_is_inverted():
    alpha = np.linspace(0, 1, 101)
    np.testing.assert_allclose(alpha_from_scale(alpha_scale(alpha)), alpha, atol=1e-12)


def test_candidate_alphas_are_ascending_and_include_the_papers_grid():
    paper = [0, 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 3 / 4, 15 / 16, 63 / 64, 255 / 256, 1]
    assert set(paper) <= set(ALPHAS)
    steps = np.diff(alpha_scale(ALPHAS))
    assert (steps > 0).all()
    assert steps.max() < 1.7


def test_doublings():
    np.testing.assert_allclose(np.diff(repetition_scale([1, 2, 4, 8])), 1)
    assert doublings_outside(16, 1, 128) == doublings_outside(128, 1, 128) == 0
    assert doublings_outside(512, 1, 128) == pytest.approx(2)
    assert doublings_outside(1, 4, 128) == pytest.approx(2)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1 / 64, "1/64"), (63 / 64, "63/64"), (0, "0"), (1.0, "1"), (0.3, "0.3"), (1 / 3, "0.333")],
)
def test_fraction(value, text):
    assert fraction(value) == text
    assert fraction(np.array(value)[()]) == text
