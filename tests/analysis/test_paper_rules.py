"""The paper's rules agree with its results, and so does a surface fitted to these results."""

import numpy as np
import pytest

from dualsm.analysis.paper_rules import PAPER_RESULTS, causal_share_of_loss, rule_alpha
from dualsm.analysis.scales import alpha_scale
from dualsm.analysis.surface import fit_surface

PAPER_GRID = [0, 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 3 / 4, 15 / 16, 63 / 64, 255 / 256, 1]


def test_rules_at_their_boundaries():
    assert [rule_alpha(r) for r in (1, 2, 16)] == [63 / 64] * 3
    assert [rule_alpha(r) for r in (32, 64, 128, 256)] == [1 / 2, 1 / 4, 1 / 8, 1 / 16]
    # Half a doubling after 16, alpha is halfway; there is no jump at 16 and 32.
    assert rule_alpha(16 * 2**0.5) == pytest.approx((63 / 64 + 1 / 2) / 2)
    assert rule_alpha(16.001) == pytest.approx(63 / 64, abs=1e-3)
    assert rule_alpha(31.999) == pytest.approx(1 / 2, abs=1e-3)


def test_the_share_of_the_loss_counts_the_causal_loss_twice():
    for alpha in (0.0, 1 / 8, 1 / 2, 1.0):
        causal, masked = 2 * alpha, 1 - alpha
        assert causal_share_of_loss(alpha) == pytest.approx(causal / (causal + masked))


def test_rules_agree_with_the_results_within_one_grid_step():
    assert [(row.repetitions, row.alpha) for row in PAPER_RESULTS] == [
        (1, 63 / 64),
        (32, 3 / 4),
        (128, 1 / 8),
    ]
    for row in PAPER_RESULTS:
        between = sorted([rule_alpha(row.repetitions), row.alpha])
        strictly_inside = [alpha for alpha in PAPER_GRID if between[0] < alpha < between[1]]
        assert not strictly_inside, row


def score_through_results(repetitions, alpha):
    """A ridge over the alpha scale with the best alpha, best score and score at alpha = 1 of the results."""
    doublings = np.log2([row.repetitions for row in PAPER_RESULTS])

    def between(values):
        return np.interp(np.log2(repetitions), doublings, values)

    best = between([alpha_scale(row.alpha) for row in PAPER_RESULTS])
    top = between([row.dual_causal for row in PAPER_RESULTS])
    fall = between(
        [(row.dual_causal - row.causal_only) / (9 - alpha_scale(row.alpha)) ** 2 for row in PAPER_RESULTS]
    )
    return top - fall * (alpha_scale(alpha) - best) ** 2


def test_surface_through_the_results_recommends_them():
    repetitions, alpha = map(np.ravel, np.meshgrid(2.0 ** np.arange(9), PAPER_GRID))
    inside = repetitions <= 128
    repetitions, alpha = repetitions[inside], alpha[inside]
    noise = 0.15 * np.random.default_rng(0).standard_normal(len(alpha))
    surface = fit_surface(
        repetitions,
        alpha,
        score_through_results(repetitions, alpha) + noise,
        lower_is_better=False,
        restarts=2,
    )
    for row in PAPER_RESULTS:
        found = surface.recommend(row.repetitions)
        # Neighbours of the paper's grid are 1.6 or more apart.
        assert abs(alpha_scale(found.alpha) - alpha_scale(row.alpha)) < 1.6, (row, found)
        assert found.score.mean == pytest.approx(row.dual_causal, abs=0.3)
        gain = row.dual_causal - row.causal_only
        assert found.gain_over_causal.mean == pytest.approx(gain, abs=0.15 + 4 * found.gain_over_causal.sd)
