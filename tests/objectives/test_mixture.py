"""Assignment of objectives to rows."""

import jax
import numpy as np
import pytest

from dualsm.objectives.mixture import assign, check_shares, make_examples, row_keys, sequence_counts
from dualsm.objectives.pairs import bind_members, entry, members_of
from dualsm.process.errors import UserError

from .conftest import SPECIAL, batch, packed, rewritten


def errors_of(shares, batch_size: int, steps: int = 500) -> np.ndarray:
    """Returns assigned minus exact rows of each objective after each number of steps, [steps + 1, J]."""
    counts_SxJ = sequence_counts(np.tile(shares, (steps, 1)), batch_size)
    assert (counts_SxJ >= 0).all()
    assert (counts_SxJ.sum(1) == batch_size).all()
    exact = np.arange(steps + 1)[:, None] * batch_size * np.array(shares)
    return np.vstack([np.zeros(len(shares)), counts_SxJ.cumsum(0)]) - exact


@pytest.mark.parametrize("batch_size", [1, 6, 8, 64])
@pytest.mark.parametrize(
    "shares",
    [[1.0], [0.5, 0.5], [63 / 64, 1 / 64], [0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [0.6, 0.3, 0.1]],
)
def test_any_window_of_steps_is_within_one_row_of_the_exact_share(shares, batch_size):
    errors = errors_of(shares, batch_size)
    assert (errors.max(0) - errors.min(0)).max() <= 1 + 1e-6


def test_any_number_of_steps_is_within_one_row_for_random_shares():
    rng = np.random.default_rng(0)
    for _ in range(200):
        shares = rng.dirichlet(np.ones(rng.integers(2, 6)) * rng.choice([0.2, 1, 5]))
        assert np.abs(errors_of(shares, int(rng.integers(1, 40)), steps=100)).max() < 1


def test_changing_shares_are_followed():
    share_S = np.linspace(0, 1, 200)
    counts_SxJ = sequence_counts(np.stack([share_S, 1 - share_S], 1), 7)
    np.testing.assert_allclose(counts_SxJ[:, 0].cumsum(), (7 * share_S).cumsum(), atol=0.51)


def test_each_slice_of_a_batch_has_about_the_mixture():
    objective_B, stratum_B, strata_B = assign(np.array([32, 16, 16]))
    for half in np.split(objective_B, 8):
        assert np.abs(np.bincount(half, minlength=3) - [4, 2, 2]).max() <= 1
    for j, count in enumerate([32, 16, 16]):
        assert sorted(stratum_B[objective_B == j]) == list(range(count))
        assert (strata_B[objective_B == j] == count).all()


def test_each_row_uses_its_objective_and_key():
    names = ["causal", "next_all", "prefix", "masked_diffusion"]
    options = {"objectives": {name: {"weight": 1.0} for name in names}}
    objectives = bind_members(members_of([entry(name, options) for name in names]), SPECIAL)
    rows = batch([packed([9, 30], 24, seed) for seed in range(32)])
    objective_B = np.arange(32) * 7 // 2 % len(names)
    together = jax.jit(lambda *a: make_examples(objectives, *a))(
        rows, objective_B, row_keys(jax.random.key(0), 32)
    )
    for j, name in enumerate(names):
        alone = rewritten(name, rows)
        for field, value in alone._asdict().items():
            np.testing.assert_array_equal(getattr(together, field)[objective_B == j], value[objective_B == j])


def test_keys_of_rows_do_not_depend_on_the_batch_size():
    few, many = (jax.random.key_data(row_keys(jax.random.key(7), n)) for n in (3, 8))
    np.testing.assert_array_equal(few, many[:3])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"causal": 0.5, "prefix": 0.4}, "sums to 0.9"),
        ({"causal": 1.5, "prefix": -0.5}, "causal=1.5"),
        ({"causal": 1.0, "telepathy": 0.0}, "telepathy"),
        ({"causal": 0.0}, "sums to 0"),
    ],
)
def test_invalid_mixtures_are_rejected(shares, message):
    with pytest.raises(UserError, match=message):
        check_shares(shares)
