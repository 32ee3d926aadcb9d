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


def max_rows_behind(entries: int) -> float:
    """Returns 1/2 + 1/3 + ... + 1/E, with the tolerance for ties."""
    return sum(1 / k for k in range(2, entries + 1)) + 1e-5


def distances(shares_SxE: np.ndarray, rows: int | np.ndarray, rows_E=None) -> np.ndarray:
    """Returns exact minus assigned rows of each entry after each step, [S, E]."""
    rows_E = np.ones(shares_SxE.shape[1], int) if rows_E is None else rows_E
    counts_SxE = sequence_counts(shares_SxE, rows, rows_E)
    rows_S = np.broadcast_to(rows, len(shares_SxE))
    assert (counts_SxE >= 0).all()
    assert (counts_SxE @ rows_E == rows_S).all()
    return (shares_SxE * rows_S[:, None]).cumsum(0) - (counts_SxE * rows_E).cumsum(0)


def random_schedule(rng, entries: int, steps: int = 40) -> np.ndarray:
    """Returns shares that change at random steps, where entries lose their whole share, [S, E]."""
    points = int(rng.integers(1, steps + 1))
    shares_KxE = rng.dirichlet(np.full(entries, rng.choice([0.3, 1, 10])), points)
    shares_KxE *= rng.random((points, entries)) < rng.choice([0.3, 0.6, 1])
    shares_KxE[shares_KxE.sum(1) == 0] = 1
    shares_KxE /= shares_KxE.sum(1, keepdims=True)
    return shares_KxE[np.sort(rng.integers(0, points, steps))]


@pytest.mark.parametrize("schedule", ["constant", "steps"])
def test_any_number_of_steps_is_within_the_stated_distance_of_the_shares(schedule):
    rng = np.random.default_rng(0)
    for _ in range(200):
        entries, rows = int(rng.integers(2, 13)), rng.choice([1, 2, 6, 16])
        shares_SxE = random_schedule(rng, entries)
        if schedule == "constant":
            shares_SxE = np.tile(shares_SxE[:1], (40, 1))
        rows = rng.integers(0, rows + 1, 40) if rng.random() < 0.3 else int(rows)
        behind_SxE = distances(shares_SxE, rows)
        assert behind_SxE.min() > -1 - 1e-5
        assert behind_SxE.max() <= max_rows_behind(entries)


def test_shares_of_at_least_a_row_per_step_are_within_one_row():
    rng = np.random.default_rng(0)
    for _ in range(100):
        entries, rows = int(rng.integers(2, 10)), int(rng.integers(10, 40))
        shares_SxE = (1 + random_schedule(rng, entries) * (rows - entries)) / rows
        assert np.abs(distances(shares_SxE, rows)).max() < 1


def test_entries_that_lose_their_share_while_ahead_delay_another_by_more_than_a_row():
    rows_SxE = np.array([[2.55, 2.55, 2.55, 2.45, 2.45, 3.45], [0, 0, 0, 5.6, 5.6, 4.8]])
    assert distances(rows_SxE / 16, 16)[1, 3] == pytest.approx(1.05)


def test_constant_shares_of_less_than_a_row_per_step_can_be_more_than_a_row_behind():
    shares = np.array([0.2368] * 4 + [0.0528 / 5] * 5)
    assert distances(np.tile(shares, (60, 1)), 1).max() > 1.2


@pytest.mark.parametrize("entries", [2, 3, 9, 12])
def test_the_largest_distance_is_reached(entries):
    """The entries that have not had a row share each step, so that the last one waits for all others."""
    shares_SxE, waiting_E = np.zeros((entries - 1, entries)), np.ones(entries, bool)
    for step in range(entries - 1):
        shares_SxE[step, waiting_E] = 1 / waiting_E.sum()
        waiting_E &= sequence_counts(shares_SxE[: step + 1], 1)[step] == 0
    assert distances(shares_SxE, 1).max() == pytest.approx(max_rows_behind(entries), abs=2e-5)


def test_pairs_at_most_double_the_distances_and_add_a_row():
    rng = np.random.default_rng(0)
    for _ in range(150):
        entries = int(rng.integers(2, 10))
        rows_E = rng.integers(1, 3, entries)
        behind_SxE = distances(random_schedule(rng, entries), int(rng.choice([2, 4, 16])), rows_E)
        assert behind_SxE.min() > -2 - 1e-5
        assert behind_SxE.max() <= 2 * max_rows_behind(entries) + 1


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
