"""Loss of every objective: packing, uniform models, empty rows, gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.objectives.example import document_spans
from dualsm.objectives.registry import OBJECTIVES
from dualsm.training.objective_loss import objective_loss

from .conftest import SPECIAL, VOCABULARY, batch, packed, rewritten

ROWS, ROW_TOKENS = 32, 24  # the same in all tests, so that every objective compiles once


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_uniform_model_scores_log_v(name, params, score):
    head = params["head"] | {"output": jax.tree.map(np.zeros_like, params["head"]["output"])}
    params = params | {"head": head}
    examples = rewritten(name, batch([packed([9, 7, 17], ROW_TOKENS, seed) for seed in range(ROWS)]))
    weighted, weight, _ = score(params, examples)
    # For masked diffusion this holds for every draw with exact counts, the default, otherwise in expectation.
    assert float(weighted / weight) == pytest.approx(math.log(VOCABULARY), rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_a_row_is_the_sum_over_its_documents(name, params, score):
    """The documents of a corrupted row, scored separately, have the same total loss."""
    lengths = [7, 1, 10, 5]
    tokens_L1, documents_L1 = packed([*lengths, 4], ROW_TOKENS)
    together = rewritten(name, batch([(tokens_L1, documents_L1)] * ROWS))
    total = float(score(params, together)[0])
    alone = 0.0
    start_L, end_L = (np.asarray(a) for a in document_spans(jnp.asarray(documents_L1[:-1])))
    for start in np.unique(start_L):
        part = slice(start, end_L[start])
        shift = {"key_start_L": start, "key_end_L": start}
        cut = {}
        for field, value in together._asdict().items():
            kept = value[:, part] - shift.get(field, 0)
            cut[field] = np.pad(kept, [(0, 0), (0, ROW_TOKENS - kept.shape[1])])
        alone += float(score(params, type(together)(**cut))[0])
    assert total > 0
    assert total == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_without_text_has_no_loss(name, params, score):
    empty = (np.zeros(ROW_TOKENS + 1, np.int32), np.full(ROW_TOKENS + 1, -1, np.int32))
    weighted, weight, _ = score(params, rewritten(name, batch([empty] * ROWS)))
    assert float(weighted) == 0.0
    assert float(weight) == 0.0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_documents_of_one_token_have_no_loss(name, params, score):
    lone = (np.full(ROW_TOKENS + 1, SPECIAL.bos, np.int32), np.arange(ROW_TOKENS + 1, dtype=np.int32))
    weighted, weight, _ = score(params, rewritten(name, batch([lone] * ROWS)))
    assert float(weighted) == 0.0
    assert float(weight) == 0.0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_special_tokens_do_not_change(name):
    """Except for the first token of a document, which a mode token may replace."""
    tokens_L1 = np.array([2, 20, 21, 3, 2, 22, 14, 23, 24, 3, 2, *range(25, 39)], np.int32)
    documents_L1 = np.array([0] * 4 + [1] * 6 + [2] * 15, np.int32)
    rows = batch([(tokens_L1, documents_L1)] * ROWS)
    options = {"modes": "S"} if name == "span_denoising" else {}  # the other modes move tokens
    inputs_BxL = rewritten(name, rows, **options).inputs_L
    for position in (3, 6, 9):
        assert (inputs_BxL[:, position] == tokens_L1[position]).all()
    modes = {SPECIAL.bos, *OBJECTIVES[name].mode_tokens.values()}
    assert set(inputs_BxL[:, [0, 4]].ravel()) <= modes


def test_prefix_lengths_are_uniform():
    """A document of n tokens draws each prefix length 1..n-1 equally often."""
    n, draws = 9, 4000
    lengths = rewritten("prefix", batch([packed([n, 30], ROW_TOKENS)] * draws)).key_end_L[:, 0]
    counts = np.bincount(lengths, minlength=n)[1:]
    assert len(counts) == n - 1
    assert counts.min() > draws / (n - 1) - 5 * math.sqrt(draws / (n - 1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_gradient_step_lowers_the_loss_by_the_first_order_term(name, params, score, gradient):
    examples = rewritten(name, batch([packed([9, 30], ROW_TOKENS, seed) for seed in range(ROWS)]))
    before, weight, _ = score(params, examples)
    step = 1e-3 / weight
    grads = gradient(params, examples)
    after, _, _ = score(jax.tree.map(lambda p, g: p - step * g, params, grads), examples)
    expected = step * sum(float((g**2).sum()) for g in jax.tree.leaves(grads))
    assert expected > 0
    assert float(before - after) == pytest.approx(float(expected), rel=0.05)


def test_objective_loss_can_be_jitted_and_differentiated(model_config, params, gradient):
    """The gradient equals that of `example_loss` on the examples."""
    rows = batch([packed([9, 30], ROW_TOKENS, seed) for seed in range(ROWS)])
    loss = objective_loss("masked_diffusion", model_config, SPECIAL, chunk=8)
    grads = jax.jit(jax.grad(lambda params: loss(params, rows, jax.random.key(0))[0]))(params)
    two_steps = gradient(params, rewritten("masked_diffusion", rows))
    for alone, twofold in zip(*map(jax.tree.leaves, (grads, two_steps)), strict=True):
        np.testing.assert_allclose(alone, twofold, atol=1e-4 * float(np.abs(twofold).max()))
