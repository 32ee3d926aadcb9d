"""Speculative sampling follows the causal distribution: by enumeration and by chi-squared tests."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from dualsm.config import freeze
from dualsm.generation import drafting, speculative
from dualsm.generation.prompt_batches import prompt_keys
from dualsm.generation.sampling_params import SamplingParams, filter_logits, mask_reserved_ids
from dualsm.generation.speculative import speculate
from dualsm.model.transformer import bind, init_params
from dualsm.objectives.example import SpecialIds
from tests.micro import micro_config

pytestmark = pytest.mark.slow

SPECIAL, PROMPT = SpecialIds(), [2, 17, 18]
VOCABULARY = 20  # four tokens and `</s>` can be sampled
ROWS = 5000
SAMPLINGS = {
    "cold": SamplingParams(0.5),
    "plain": SamplingParams(1.0),
    "hot": SamplingParams(2.0),
    "filtered": SamplingParams(1.0, top_k=4, top_p=0.85),
}


@functools.cache
def model():
    """Returns config and parameters of a model with one small layer, whose distributions are not flat."""
    config = micro_config().model
    config.num_layers, config.d_model, config.num_heads, config.d_ff = 1, 16, 1, 16
    config.vocab_size = VOCABULARY
    params = init_params(config, jax.random.key(1))
    return freeze(config), jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, params)


TOKENS = [SPECIAL.eos, *range(16, VOCABULARY)]
CONTEXTS = list(itertools.product(TOKENS[1:], repeat=3))


@functools.cache
def logits(texts, num_masks=0):
    """Returns the logits after the prompt and each further token, [texts, positions, V], without a cache.

    The last `num_masks` tokens attend to each other, all others to themselves and to earlier ones.
    """
    config, params = model()
    tokens_BxL = np.array([(*PROMPT, *text) for text in texts])
    position_L = np.arange(tokens_BxL.shape[1])
    is_mask_L = position_L >= len(position_L) - num_masks
    end_BxL = np.tile(np.where(is_mask_L, len(position_L), position_L + 1), (len(texts), 1))
    run = jax.jit(lambda params: bind(config, params).logits(tokens_BxL, np.zeros_like(end_BxL), end_BxL))
    return run(params)[:, len(PROMPT) - 1 :]


@functools.cache
def distribution(sampling, texts, num_masks=0):
    """Returns the distributions from which tokens are sampled, from `logits`."""
    filtered = jax.jit(
        jax.vmap(jax.vmap(lambda x: filter_logits(mask_reserved_ids(x, SPECIAL, True), sampling)))
    )
    return np.asarray(jax.nn.softmax(filtered(logits(texts, num_masks))), np.float64)


def after(sampling, text):
    """Returns the causal distribution after the prompt and a text of up to three tokens, [V]."""
    context = (*text, *CONTEXTS[0])[:3]
    return distribution(sampling, tuple(CONTEXTS))[CONTEXTS.index(context), len(text)]


def exact_texts(sampling, count):
    """Returns the probability of every text of up to `count` tokens."""
    found, open_texts = {}, {(): 1.0}
    for _ in range(count):
        longer = {}
        for text, probability in open_texts.items():
            for token in TOKENS:
                part = found if token == SPECIAL.eos else longer
                part[(*text, token)] = probability * after(sampling, text)[token]
        open_texts = longer
    return found | open_texts


def sampled(sampling, new_tokens, draft, batches=4):
    """Returns continuations of the prompt, and the number of drafted tokens that each text has kept."""
    config, params = model()
    prompts_BxP, prompt_B = np.tile(np.array(PROMPT, np.int32), (ROWS, 1)), np.full(ROWS, 3, np.int32)
    texts, kept = [], []
    for seed in range(batches):
        keys_B = jax.random.split(jax.random.key(seed), ROWS)
        state = speculative.start(config, params, prompts_BxP, prompt_B, keys_B, 4, SPECIAL)
        state = speculate(
            config, params, state, np.full(ROWS, draft, np.int32), prompt_B + new_tokens, 99,
            size=3, sampling=sampling, special=SPECIAL,
        )  # fmt: skip
        texts.append(np.array(state.tokens_BxS)[:, 3:])
        kept.append(np.array(state.accepted_B))
    return np.concatenate(texts), np.concatenate(kept)


@pytest.mark.parametrize("batches", [4, pytest.param(20, marks=pytest.mark.extras)])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_texts_follow_the_causal_distribution(name, batches):
    """Two drafts of three tokens at most: rejections, complete drafts, and `</s>` inside a draft occur."""
    sampling = SAMPLINGS[name]
    texts, _ = sampled(sampling, 4, 3, batches)
    codes, counts = np.unique(texts, axis=0, return_counts=True)
    counted = {tuple(code[code != SPECIAL.pad].tolist()): n for code, n in zip(codes, counts, strict=True)}
    exact = exact_texts(sampling, 4)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    assert all(exact[text] > 0 for text in counted)
    expected = np.array([exact[text] for text in exact]) * len(texts)
    observed = np.array([counted.get(text, 0) for text in exact])
    common = expected >= 10
    assert common.sum() > 20
    groups = [np.append(x[common], x[~common].sum()) for x in (observed, expected)]
    groups = [x[groups[1] > 0] for x in groups]
    assert chisquare(groups[0], groups[1] * len(texts) / groups[1].sum()).pvalue > 1e-3


@pytest.mark.parametrize("name", SAMPLINGS)
def test_acceptance_probability_is_the_overlap_of_both_distributions(name):
    """A token is accepted with probability min(p, q), summed over tokens: by enumeration, and in samples."""
    sampling, masks = SAMPLINGS[name], (SPECIAL.mask,)
    config, params = model()
    q_2xV = distribution(sampling, (masks,), 1)[0]  # the mask sees the text and itself
    p_V = after(sampling, ())
    np.testing.assert_allclose(q_2xV[0], p_V, atol=1e-6)  # the first drafted token is exact
    pairs = [(a, b) for a in TOKENS[1:] for b in TOKENS if min(p_V[a], q_2xV[1][b]) > 0]
    expected = [min(1, after(sampling, (a,))[b] / q_2xV[1][b]) for a, b in pairs]

    @jax.jit
    def acceptance(params, cache):
        bound = bind(config, params)
        length_B, size_B = jnp.full(len(pairs), 3), jnp.full(len(pairs), 2)
        last_B = jnp.full(len(pairs), PROMPT[-1])
        features, cache = drafting.draft_features(
            bound, last_B, length_B, size_B, cache, size=2, mask=SPECIAL.mask
        )
        log_q_BxPxV = drafting.log_distributions(bound, features, sampling, SPECIAL)
        draft = drafting.Draft(jnp.array(pairs), log_q_BxPxV, size_B)
        log_p_BxP1xV, _ = drafting.verify(bound, draft, length_B, cache, sampling, SPECIAL)
        return log_q_BxPxV[0], jnp.exp(drafting.log_acceptance(draft, log_p_BxP1xV))

    prompts_BxP, prompt_B = np.tile(np.array(PROMPT), (len(pairs), 1)), np.full(len(pairs), 3)
    state = speculative.start(config, params, prompts_BxP, prompt_B, prompt_keys(0, pairs), 4, SPECIAL)
    log_q_2xV, found = jax.device_get(acceptance(params, state.cache))
    np.testing.assert_allclose(np.exp(log_q_2xV), q_2xV, atol=1e-6)
    np.testing.assert_array_equal(found[:, 0], 1)
    np.testing.assert_allclose(found[:, 1], expected, atol=1e-4)
    # `</s>` as the first token ends the text; no other token is kept.
    total = sum(p_V[a] * q_2xV[1][b] * x for (a, b), x in zip(pairs, expected, strict=True))
    assert 0.02 < total < 0.98
    kept = sampled(sampling, 2, 2)[1]
    assert abs(kept.mean() - (1 + total)) < 4 * kept.std() / len(kept) ** 0.5


@pytest.mark.parametrize("name", SAMPLINGS)
def test_accepted_and_redrawn_tokens_together_follow_p(name):
    """By enumeration of both cases, for many pairs of distributions."""
    for key in jax.random.split(jax.random.key(0), 20):
        logits_2xV = 2 * jax.random.normal(key, (2, 12))
        log_p_V, log_q_V = (jax.nn.log_softmax(filter_logits(x_V, SAMPLINGS[name])) for x_V in logits_2xV)
        accepted_V = np.minimum(np.exp(log_p_V), np.exp(log_q_V))
        redrawn_V = np.asarray(jax.nn.softmax(drafting.log_residual(log_p_V, log_q_V)))
        found_V = accepted_V + (1 - accepted_V.sum()) * redrawn_V
        np.testing.assert_allclose(found_V, np.exp(log_p_V), atol=1e-6)
        same_V = jax.nn.softmax(drafting.log_residual(log_p_V, log_p_V))  # never rejected, but defined
        np.testing.assert_allclose(same_V, np.exp(log_p_V), atol=1e-6)
