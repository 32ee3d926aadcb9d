"""The losses themselves: exact bounds by enumeration, packing, uniform models, who may be masked."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.model.transformer import bind, init_params
from dualsm.objectives import masked_diffusion as diffusion
from dualsm.objectives.example import Row, SpecialIds, document_spans, single_row
from dualsm.objectives.loss import example_loss, objective_loss
from dualsm.objectives.mixture import OBJECTIVES

from .conftest import batch, packed, tiny_model

SPECIAL = SpecialIds()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_uniform_model_scores_log_v(name, model_config):
    params = init_params(model_config, jax.random.key(0))
    params["head"]["output"] = jax.tree.map(jnp.zeros_like, params["head"]["output"])
    rows = batch([packed([9, 30, 17], 48, seed) for seed in range(64)])
    weighted, weight, _ = objective_loss(name, model_config, SPECIAL)(params, rows, jax.random.key(0))
    # Masked diffusion holds in expectation; with exact counts it holds for every draw.
    assert float(weighted / weight) == pytest.approx(math.log(64), rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_documents_score_as_they_do_alone(name, model_config, params):
    """An example of several documents has the loss of its documents cut apart, corruption included."""
    lengths = [7, 1, 12, 5]
    tokens_L1, documents_L1 = packed([*lengths, 3], sum(lengths) - 1)
    example = OBJECTIVES[name](single_row(tokens_L1, documents_L1), jax.random.key(3), SPECIAL)
    together = jax.tree.map(lambda a: a[None], example)
    model = bind(model_config, params)
    total, _, _ = example_loss(model, together, chunk=8)
    alone = 0.0
    start_L, end_L = (np.asarray(a) for a in document_spans(jnp.asarray(documents_L1[:-1])))
    for start in np.unique(start_L):
        part = slice(start, end_L[start])
        shift = {"key_start_L": start, "key_end_L": start}
        cut = type(example)(
            **{name: (value[part] - shift.get(name, 0))[None] for name, value in example._asdict().items()}
        )
        alone += float(example_loss(model, cut, chunk=8)[0])
    assert float(total) > 0
    assert float(total) == pytest.approx(alone, rel=1e-5)


def test_the_masked_diffusion_estimate_is_unbiased():
    """Its mean over all corruptions equals the bound computed by enumerating masks and outcomes."""
    vocabulary, length = 18, 4  # two text tokens
    config = tiny_model(vocabulary, width=8)
    keys = iter(jax.random.split(jax.random.key(5), 50))
    params = jax.tree.map(
        lambda p: p + 0.5 * jax.random.normal(next(keys), p.shape), init_params(config, jax.random.key(1))
    )
    model = bind(config, params)
    tokens_L1 = jnp.array([2, 16, 17, 17, 16], jnp.int32)
    documents_L1 = jnp.zeros(length + 1, jnp.int32)

    # By definition: sum over subsets S of the targets of P(S) * n/|S| * sum over S of -log p(x | rest).
    nll = {}
    for subset in itertools.product([False, True], repeat=length):
        if any(subset):
            inputs = np.array(tokens_L1[:-1])
            inputs[1:][np.array(subset[:-1])] = SPECIAL.mask
            zeros, ends = jnp.zeros((1, length), jnp.int32), jnp.full((1, length), length)
            log_p = jax.nn.log_softmax(model.logits(jnp.asarray(inputs)[None], zeros, ends)[0])
            nll[subset] = -sum(float(log_p[i, tokens_L1[i + 1]]) for i in range(length) if subset[i])
    exact = sum(
        loss * (1 / length) / math.comb(length, sum(subset)) * length / sum(subset)
        for subset, loss in nll.items()
    )

    # By the objective: every stratum of the time, many places each.
    draws = 4000
    rows = Row(
        jnp.tile(tokens_L1, (draws, 1)),
        jnp.tile(documents_L1, (draws, 1)),
        jnp.arange(draws),
        jnp.full(draws, draws),
        jnp.zeros(draws),
    )
    examples = jax.vmap(lambda row, key: diffusion.masked_diffusion(row, key, SPECIAL))(
        rows, jax.random.split(jax.random.key(0), draws)
    )
    _, counted, stats = example_loss(model, examples, chunk=8)
    masked = np.asarray(examples.weights_L > 0)
    estimates = np.asarray(stats.nll_B)

    # The probability of each subset is exactly 1/n / C(n, k), up to the noise of 4000 draws ...
    for subset in nll:
        share = (masked == np.array(subset)).all(1).mean()
        expected = 1 / length / math.comb(length, sum(subset))
        assert abs(share - expected) < 4 * math.sqrt(expected / draws)
    # ... each draw is the enumerated loss of its subset, and so the mean is the bound.
    for subset, loss in nll.items():
        chosen = estimates[(masked == np.array(subset)).all(1)]
        np.testing.assert_allclose(chosen, loss * length / sum(subset), rtol=1e-4)
    error = estimates.std() / math.sqrt(draws)
    assert abs(estimates.mean() - exact) < 4 * error
    assert float(counted) == draws * length


def test_the_number_of_masked_tokens_is_uniform_over_the_strata():
    """Low-discrepancy times: with n rows of n maskable tokens every count 1..n comes exactly once."""
    n = 24
    rows = batch([packed([60], n, seed) for seed in range(n)])
    for seed in range(5):
        keys = jax.random.split(jax.random.key(seed), n)
        examples = jax.vmap(lambda row, key: diffusion.masked_diffusion(row, key, SPECIAL))(rows, keys)
        counts = np.asarray((examples.weights_L > 0).sum(1))
        assert sorted(counts.tolist()) == list(range(1, n + 1))
        weights = np.asarray(examples.weights_L.max(1))
        np.testing.assert_allclose(weights, n / counts, rtol=1e-6)


def test_special_tokens_are_never_masked_and_never_counted():
    tokens_L1 = np.array([2, 20, 3, 2, 5, 21, 22, 3, 2], np.int32)
    documents_L1 = np.array([0, 0, 0, 1, 1, 1, 1, 1, 2], np.int32)
    text = np.array([True, False, False, False, True, True, False, False])  # by target position
    for seed in range(30):
        row = single_row(tokens_L1, documents_L1)
        example = OBJECTIVES["masked_diffusion"](row, jax.random.key(seed), SPECIAL)
        assert (np.asarray(example.counted_L) == text).all()
        assert not np.asarray(example.weights_L)[~text].any()
        changed = np.flatnonzero(np.asarray(example.inputs_L) != tokens_L1[:-1])
        assert set(changed) <= {1, 5, 6}


def test_masked_inputs_are_those_that_carry_loss():
    """Token i + 1 is hidden in the inputs if and only if position i has to predict it."""
    row = single_row(*packed([11, 30], 32))
    for seed in range(10):
        example = OBJECTIVES["masked_diffusion"](row, jax.random.key(seed), SPECIAL)
        hidden = np.asarray(example.inputs_L) == SPECIAL.mask
        np.testing.assert_array_equal(hidden[1:], np.asarray(example.weights_L)[:-1] > 0)
        assert not hidden[0]


def test_a_row_without_text_costs_nothing(model_config, params):
    rows = batch([(np.zeros(17, np.int32), np.full(17, -1, np.int32))])
    for name in OBJECTIVES:
        weighted, weight, _ = objective_loss(name, model_config, SPECIAL)(params, rows, jax.random.key(0))
        assert float(weighted) == 0.0
        assert float(weight) == 0.0


def test_prefix_lengths_are_uniform():
    """A document of n tokens gets each prefix length 1..n-1 equally often."""
    n, draws = 9, 4000
    tokens_L1, documents_L1 = packed([n, 30], 24)
    row = single_row(tokens_L1, documents_L1)
    keys = jax.random.split(jax.random.key(0), draws)
    examples = jax.vmap(lambda key: OBJECTIVES["prefix"](row, key, SPECIAL))(keys)
    lengths = np.asarray(examples.key_end_L[:, 0])
    counts = np.bincount(lengths, minlength=n)[1:]
    assert len(counts) == n - 1
    assert counts.min() > draws / (n - 1) - 5 * math.sqrt(draws / (n - 1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_a_function_to_jit_and_differentiate(name, model_config, params):
    loss = objective_loss(name, model_config, SPECIAL)
    rows = batch([packed([9, 30], 24, seed) for seed in range(4)])

    def mean(params):
        weighted, weight, _ = loss(params, rows, jax.random.key(0))
        return weighted / weight

    value, grads = jax.jit(jax.value_and_grad(mean))(params)
    direction = jax.tree.map(lambda g: g / 10, grads)
    step = jax.tree.map(lambda p, d: p - 1e-2 * d, params, direction)
    expected = sum(
        float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True)
    )
    assert float(value - mean(step)) == pytest.approx(1e-2 * expected, rel=0.05)
