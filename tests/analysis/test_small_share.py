"""The price of a small share of masked rows, in the answer of the confirmed runs."""

import pytest

from dualsm.analysis.advice import SHIPPED, round_repetitions
from dualsm.analysis.advice_text import SHIPPED_DECAY
from dualsm.analysis.confirmed import answer, describe_confirmed
from dualsm.analysis.small_share import describe_small_share, small_share
from dualsm.analysis.table import comparable, load


def cell(alpha, repetitions, causal, masked=7.0, seed=0, budget=1000, decay=0.1, status="done"):
    return {
        "alpha": str(alpha), "repetitions": str(repetitions), "seed": str(seed), "status": status,
        "budget_tokens": str(budget), "optimizer.weight_decay": str(decay),
        "optimizer.learning_rate": "0.01", "valid/causal/loss": str(causal),
        "valid/masked_diffusion/loss": str(masked),
    }  # fmt: skip


CELLS = [
    cell(1, 1, 2.0),
    cell(63 / 64, 1, 2.25, 5.0),
    cell(1, 16, 3.0),
    cell(1, 16, 3.5, seed=1),
    cell(63 / 64, 16, 3.25, 4.0),
    cell(63 / 64, 16, 4.25, 4.5, seed=1),
    cell(63 / 64, 16, 9.0, seed=2),  # without a causal run of this seed
    cell(1, 16, 9.0, seed=3, decay=1.0),
    cell(63 / 64, 16, 9.0, seed=3),  # another weight decay
    cell(1, 4, 9.0, budget=500),  # a part of the budget
    cell(63 / 64, 4, 1.0, budget=500),
    cell(1, 4, 9.0, status="running"),
    cell(63 / 64, 4, 1.0),
    cell(1, 64, 9.0),
    cell(63 / 64, 64, 1.0),  # many repetitions
    cell("", 1, 1.0),  # not a mixture of two objectives
]


def test_the_price_compares_cells_with_equal_seeds_and_settings():
    found = small_share(CELLS)
    assert (found.repetitions, found.seeds) == ((1, 16), (1, 2))
    assert found.causal_changes == pytest.approx((0.25, 0.5))
    assert found.masked == pytest.approx((5.0, 4.25))
    assert found.masked_changes == pytest.approx((-2.0, -2.75))


def test_the_price_is_stated_at_few_repetitions_only():
    line = describe_small_share(small_share(CELLS))
    mixture = "causal 63/64, masked_diffusion 1/64"
    assert line.strip().startswith(f"for a second mode at R = 1 to 16, train with: {mixture}; not confirmed")
    assert "the causal loss by +0.250 to +0.500 and the masked-diffusion loss by -2.8 to -2.0" in line
    for repetitions in (16, 17):
        lines = describe_confirmed(answer(round_repetitions(1e6, repetitions * 1e6)))
        assert (describe_small_share(small_share()) in lines) == (repetitions == 16)


@pytest.mark.parametrize("metric", ["valid/causal/loss", "valid/masked_diffusion/loss", "task/mean/causal"])
def test_all_cells_of_a_shipped_surface_have_one_weight_decay(metric):
    cells = comparable(load(SHIPPED), metric)
    assert set(cells["optimizer.weight_decay"]) == {0.1}
    assert SHIPPED_DECAY.strip().startswith("all its cells have weight decay 0.1")
