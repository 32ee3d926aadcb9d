"""Masked diffusion: the bound, by enumeration, for each option that keeps it; maskable tokens."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import truncnorm

from dualsm.model.transformer import bind
from dualsm.objectives.masked_diffusion import MIN_WIDTH, draw_time
from dualsm.training.objective_loss import example_loss

from .conftest import SPECIAL, batch, far_from_initial, packed, rewritten, tiny_model

TOKENS_L1 = np.array([2, 16, 17, 17, 16], np.int32)
LENGTH = 4
WIDTH = 0.25
BELL = {"time": "bell", "width": WIDTH}


@pytest.fixture(scope="module")
def tiny():
    """Returns a config of a model of two text tokens, parameters, and its compiled log-probabilities."""
    config = tiny_model(18, width=8)
    params = far_from_initial(config, 0.5)

    @jax.jit
    def log_p(inputs_BxL):
        zeros_BxL = jnp.zeros_like(inputs_BxL)
        return jax.nn.log_softmax(
            bind(config, params).logits(inputs_BxL, zeros_BxL, jnp.full_like(zeros_BxL, LENGTH))
        )

    return config, params, log_p


def enumerated(log_p, shifted: bool = True) -> dict[tuple[bool, ...], float]:
    """Returns the summed nll of the masked tokens for every subset, by predicting position."""
    subsets = [s for s in itertools.product([False, True], repeat=LENGTH) if any(s)]
    if not shifted:
        subsets = [s for s in subsets if not s[0]]  # position 0 would predict <s>
    inputs_BxL = np.tile(TOKENS_L1[:-1], (15, 1))
    for inputs_L, subset in zip(inputs_BxL, subsets, strict=False):
        if shifted:
            inputs_L[1:][np.array(subset[:-1])] = SPECIAL.mask
        else:
            inputs_L[np.array(subset)] = SPECIAL.mask
    log_p_BxLxV = np.asarray(log_p(inputs_BxL))
    target = TOKENS_L1[1:] if shifted else TOKENS_L1[:-1]
    return {
        s: -sum(float(log_p_BxLxV[b, i, target[i]]) for i in range(LENGTH) if s[i])
        for b, s in enumerate(subsets)
    }


def draw(count: int, **options):
    return rewritten(
        "masked_diffusion", batch([(TOKENS_L1, np.zeros(LENGTH + 1, np.int32))] * count), **options
    )


def sampled(example, nll: dict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the loss of each draw, from the enumerated ones, and its loss denominator, [B] each."""
    masked_BxL, loss_denominator_B = example.weights_L > 0, example.loss_denominator_L.sum(1)
    sums_B = np.array([nll[tuple(m)] if any(m) else 0.0 for m in masked_BxL.tolist()])
    return example.weights_L.max(1) * sums_B, loss_denominator_B


def expected(nll: dict, n: int, weight=lambda n, k: n / k, chance=lambda n, k: 1 / n) -> float:
    """Returns the sum over subsets of P(k) / C(n, k) * weight * nll."""
    total = 0.0
    for subset, loss in nll.items():
        k = sum(subset)
        total += chance(n, k) / math.comb(n, k) * weight(n, k) * loss
    return total


def chance_of_bell(n: int, k: int) -> float:
    bell = truncnorm(-0.5 / WIDTH, 0.5 / WIDTH, 0.5, WIDTH)
    return bell.cdf(k / n) - bell.cdf((k - 1) / n)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exact": False},
        BELL,
        BELL | {"exact": False},
        {"shifted": False},
        {"shifted": False, "exact": False},
    ],
    ids=str,
)
def test_the_estimate_is_unbiased(options, tiny):
    """The mean over random corruptions equals the bound by enumeration of all masks."""
    shifted = options.get("shifted", True)
    nll = enumerated(tiny[2], shifted)
    n, draws = (4 if shifted else 3), 40_000
    losses_B, loss_denominator_B = sampled(draw(draws, **options), nll)
    assert (loss_denominator_B == n).all()
    error = losses_B.std() / math.sqrt(draws)
    assert error < 0.02 * expected(nll, n)
    assert abs(losses_B.mean() - expected(nll, n)) < 4 * error


def test_each_draw_is_the_loss_of_its_subset(tiny):
    """The loss of a draw is the enumerated one, and each subset has the right probability."""
    config, params, log_p = tiny
    nll, draws = enumerated(log_p), 4000
    example = draw(draws)
    _, counted, stats = jax.jit(lambda e: example_loss(bind(config, params), e, 8))(example)
    np.testing.assert_allclose(stats.nll_B, sampled(example, nll)[0], rtol=1e-4)
    assert float(counted) == draws * LENGTH
    for subset in nll:
        share = ((example.weights_L > 0) == np.array(subset)).all(1).mean()
        chance = 1 / LENGTH / math.comb(LENGTH, sum(subset))
        assert abs(share - chance) < 4 * math.sqrt(chance / draws)


@pytest.mark.parametrize(
    ("options", "weight", "chance"),
    [
        ({"clip": 1.5}, lambda n, k: min(n / k, 1.5), lambda n, k: 1 / n),
        (BELL | {"importance": False}, lambda n, k: n / k, chance_of_bell),
        (BELL | {"importance": False, "clip": 1.5}, lambda n, k: min(n / k, 1.5), chance_of_bell),
    ],
    ids=["clip", "bell", "both"],
)
def test_options_that_break_the_bound_have_the_expected_mean(options, weight, chance, tiny):
    nll, draws = enumerated(tiny[2]), 40_000
    losses_B, _ = sampled(draw(draws, **options), nll)
    mean = expected(nll, 4, weight, chance)
    error = losses_B.std() / math.sqrt(draws)
    assert abs(losses_B.mean() - mean) < 4 * error
    assert abs(mean - expected(nll, 4)) > 5 * error  # the mean differs from the bound


@pytest.mark.parametrize("width", [MIN_WIDTH, 0.2, 1.0])
def test_the_bell_is_a_normal_distribution_truncated_to_the_unit_interval(width):
    """Of n tokens, k = 1 + floor(n * t) are masked, and t has the quantiles of the bell."""
    n, rows = 64, 2000
    example = rewritten("masked_diffusion", batch([packed([100], n)] * rows), time="bell", width=width)
    masked_B = (example.weights_L > 0).sum(1)
    bell = truncnorm(-0.5 / width, 0.5 / width, 0.5, width)
    borders = n * bell.ppf(np.arange(rows + 1) / rows)  # the strata of the batch, in tokens
    assert (masked_B >= np.floor(borders[:-1])).all()
    assert (masked_B <= 1 + np.ceil(borders[1:])).all()
    assert (masked_B - 0.5).mean() == pytest.approx(n / 2, abs=0.1)
    # The density that the weights are divided by is the bell's.
    densities = n / masked_B / example.weights_L.max(1)
    middle = bell.pdf(bell.ppf((np.arange(rows) + 0.5) / rows))
    np.testing.assert_allclose(densities[5:-5], middle[5:-5], rtol=0.1)


def test_the_weights_of_a_bell_of_the_minimum_width_have_mean_1():
    """The mean is over all possible draws except 0, which has the remaining mass of narrow bells."""

    def mean(width: float) -> float:
        uniform = jnp.arange(1, 2**23, dtype=jnp.float32) / 2**23
        return np.mean(1 / np.asarray(draw_time(uniform, "bell", width)[1], np.float64))

    assert mean(MIN_WIDTH) == pytest.approx(1, abs=0.01)
    assert mean(0.08) < 0.9
    with pytest.raises(ValueError, match="width=0.14 is too narrow.*at least 0.15"):
        rewritten("masked_diffusion", batch([packed([100], 64)]), time="bell", width=0.14)


def test_tokens_are_masked_independently_with_probability_t():
    n, rows = 64, 2000
    masked = rewritten("masked_diffusion", batch([packed([100], n)] * rows), exact=False).weights_L > 0
    t_B = (np.arange(rows) + 0.5) / rows
    for low, high in itertools.pairwise((0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)):
        part = (t_B > low) & (t_B < high)
        deviation = (masked[part].sum(1) - n * t_B[part]) / np.sqrt(n * t_B[part] * (1 - t_B[part]))
        assert abs(deviation.mean()) < 4 / math.sqrt(part.sum())
        assert 0.8 < deviation.std() < 1.2  # as for a binomial distribution; 0 for exact counts


def test_weights_are_clipped():
    rows = batch([packed([60], 24, seed) for seed in range(24)])
    free, clipped = (rewritten("masked_diffusion", rows, clip=clip).weights_L for clip in (0.0, 3.0))
    assert free.max() == 24
    np.testing.assert_array_equal(clipped, np.minimum(free, 3.0))


def test_the_number_of_masked_tokens_is_uniform_over_the_strata():
    """With n rows of n maskable tokens, every count 1..n occurs exactly once."""
    n = 24
    rows = batch([packed([60], n, seed) for seed in range(n)])
    for seed in range(5):
        examples = rewritten("masked_diffusion", rows, seed)
        counts = (examples.weights_L > 0).sum(1)
        assert sorted(counts.tolist()) == list(range(1, n + 1))
        np.testing.assert_allclose(examples.weights_L.max(1), n / counts, rtol=1e-6)


@pytest.mark.parametrize("shifted", [True, False])
def test_special_tokens_are_never_masked_and_not_in_the_denominator(shifted):
    tokens_L1 = np.array([2, 20, 3, 2, 5, 21, 22, 3, 2], np.int32)
    documents_L1 = np.array([0, 0, 0, 1, 1, 1, 1, 1, 2], np.int32)
    by_target = [0, 4, 5] if shifted else [1, 5, 6]
    example = rewritten("masked_diffusion", batch([(tokens_L1, documents_L1)] * 30), shifted=shifted)
    for b in range(30):
        assert np.flatnonzero(example.loss_denominator_L[b]).tolist() == by_target
        assert set(np.flatnonzero(example.weights_L[b])) <= set(by_target)
        assert set(np.flatnonzero(example.inputs_L[b] != tokens_L1[:-1])) <= {1, 5, 6}


def test_masked_inputs_are_the_targets_with_loss():
    """Token i + 1 is masked in the inputs if and only if position i has loss."""
    example = rewritten("masked_diffusion", batch([packed([11, 30], 32)] * 10))
    hidden = example.inputs_L == SPECIAL.mask
    np.testing.assert_array_equal(hidden[:, 1:], example.weights_L[:, :-1] > 0)
    assert not hidden[:, 0].any()


def test_an_unshifted_position_predicts_the_token_masked_there():
    tokens_L1, documents_L1 = packed([11, 30], 32)
    tokens_L1, documents_L1 = (
        tokens_L1[3:],
        documents_L1[3:],
    )  # the first document continues from the previous row
    example = rewritten("masked_diffusion", batch([(tokens_L1, documents_L1)] * 10), shifted=False)
    np.testing.assert_array_equal(example.targets_L, np.tile(tokens_L1[:-1], (10, 1)))
    np.testing.assert_array_equal(example.inputs_L == SPECIAL.mask, example.weights_L > 0)
    assert (example.weights_L[:, 0] > 0).any()


def test_bell_options_have_no_effect_on_uniform_times():
    rows = batch([packed([11, 30], 32)] * 10)
    plain = rewritten("masked_diffusion", rows)
    wide = rewritten("masked_diffusion", rows, importance=False, width=0.5)
    jax.tree.map(np.testing.assert_array_equal, plain, wide)
