"""Unmasking in blocks with a cache: equality with block-causal attention without a cache, cost, batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import freeze
from dualsm.generation import prompt_batches
from dualsm.generation.cached_diffusion import (
    ForwardCounts,
    forward_block,
    infill_blocks,
    start,
    unmask_blocks,
)
from dualsm.generation.diffusion import UnmaskingParams, infill
from dualsm.generation.prompt_batches import prompt_keys
from dualsm.generation.sampling_params import SamplingParams
from dualsm.model.transformer import bind, init_params
from dualsm.objectives.block_diffusion import block_ends
from dualsm.objectives.example import SpecialIds
from dualsm.process.errors import UserError
from tests.micro import micro_config

GREEDY, HOT, SPECIAL = SamplingParams(temperature=0), SamplingParams(temperature=3.0), SpecialIds()
MASK, VOCABULARY, BLOCK = SPECIAL.mask, 64, 5


@pytest.fixture(scope="module")
def model():
    """Returns config and parameters of a model that is not trained, whose distributions are not flat."""
    config = micro_config().model
    config.vocab_size = VOCABULARY
    params = init_params(config, jax.random.key(3))
    return freeze(config), jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)


def texts_of(*shapes: str) -> list[list[int]]:
    """Returns a text per shape: `<s>`, a random token for each "x", and a mask for each other character."""
    rng = np.random.default_rng(0)
    return [[2, *(int(rng.integers(16, 64)) if c == "x" else MASK for c in shape)] for shape in shapes]


TEXTS = texts_of(
    "x" * 3 + "." * 20,  # the first block has masks
    "x" * 9 + "." * 14,  # the prompt ends with a block
    "x" * 12 + "." * 9,
    "x" * 6 + "..." + "x" * 9 + "." * 2 + "x" * 3,  # blocks without masks between and after the masks
    "x" * 4,  # no masks
)


def run(model, texts, sampling=GREEDY, seed=0, counts=None, **unmasking):
    params = UnmaskingParams(**{"block": BLOCK} | unmasking)
    keys_B = prompt_keys(seed, texts)
    return list(infill_blocks(*model, texts, sampling, params, SPECIAL, keys_B, counts))[-1]


def uncached_logits(model, tokens_BxL, length_B, block):
    """Returns the logits of a pass on whole texts, in which attention is block-causal, [B, L, V]."""
    config, params = model
    zeros_BxL = jnp.zeros_like(tokens_BxL)
    end_BxL = jax.vmap(block_ends, (0, 0, None))(zeros_BxL, zeros_BxL + length_B[:, None], block)
    return bind(config, params).logits(tokens_BxL, zeros_BxL, end_BxL)


@pytest.mark.parametrize("block", [1, 5, 16])
def test_logits_equal_uncached_block_causal_ones_in_every_pass(model, block):
    config, params = model
    tokens_BxS, length_B = prompt_batches.pad_batch(TEXTS, SPECIAL.pad)
    state = start(
        config, params, tokens_BxS, length_B, prompt_keys(0, TEXTS), prefix=16, block=block, special=SPECIAL
    )

    @jax.jit
    def both(state):
        done = forward_block(bind(config, params), state, block, MASK)
        whole = uncached_logits(model, state.tokens_BxS, state.length_B, block)
        before_BxP = jnp.clip(done.position_BxP - 1, 0, whole.shape[1] - 1)
        expected = jnp.take_along_axis(whole, before_BxP[..., None], axis=1)
        return bind(config, params).output_logits(done.features_BxPxD), expected, done.masked_BxP

    unmasking, passes, compared = UnmaskingParams(block=block), 0, np.zeros(len(TEXTS), int)
    compiled = unmask_blocks._cache_size()
    while (np.asarray(state.tokens_BxS) == MASK).any():
        cached, uncached, masked_BxP = jax.device_get(both(state))
        np.testing.assert_allclose(cached[masked_BxP], uncached[masked_BxP], atol=1e-4)
        compared += masked_BxP.any(1)
        state = unmask_blocks(config, params, state, 1, sampling=HOT, unmasking=unmasking, special=SPECIAL)
        passes += 1
        assert passes < 60
    assert compared.tolist() == [text.count(MASK) for text in TEXTS]  # one token per pass
    assert unmask_blocks._cache_size() == compiled + 1  # all blocks run one program


@pytest.fixture(scope="module")
def whole_pass(model):
    """Returns the function from a text of up to 32 tokens to its logits with blocks of `BLOCK`, [L, V]."""
    run = jax.jit(lambda tokens_BxL, length_B: uncached_logits(model, tokens_BxL, length_B, BLOCK)[0])
    return lambda text: np.array(run(*prompt_batches.pad_batch([text], SPECIAL.pad)))[: len(text)]


def reference(whole_pass, text, threshold) -> list[int]:
    """Unmasks greedily, block by block, with a pass on the whole text for every step."""
    text = list(text)
    while MASK in text:
        first = text.index(MASK) // BLOCK * BLOCK
        places = [i for i in range(first, min(first + BLOCK, len(text))) if text[i] == MASK]
        logits_LxV = whole_pass(text)
        logits_LxV[:, :16] = -np.inf
        p_LxV = np.asarray(jax.nn.softmax(logits_LxV))
        best = sorted(places, key=lambda i: -p_LxV[i - 1].max())
        chosen = {best[0]} | {i for i in places if threshold and p_LxV[i - 1].max() >= threshold}
        for i in chosen:
            text[i] = int(p_LxV[i - 1].argmax())
    return text


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_greedy_texts_equal_those_without_a_cache(model, whole_pass, threshold):
    found = run(model, TEXTS, threshold=threshold)
    assert found == [reference(whole_pass, text, threshold) for text in TEXTS]


@pytest.mark.parametrize(("order", "block"), [("random", 24), ("confidence", 2**20)])
def test_one_block_equals_unmasking_without_a_cache(model, order, block):
    """Also when tokens are sampled: the random numbers are the same."""
    keys_B = prompt_keys(0, TEXTS)
    plain = list(infill(*model, TEXTS, HOT, UnmaskingParams(order=order, steps=4), SPECIAL, keys_B))[-1]
    assert run(model, TEXTS, HOT, order=order, steps=4, block=block) == plain


def test_number_of_forward_passes(model):
    """Each block takes one pass per token, or `steps` passes, and one to store it, except for the last."""
    masks = [
        [1, 5, 5, 5, 4],
        [5, 5, 4],
        [2, 5, 2],
        [3, 0, 1, 1],
        [],
    ]  # per block from the first one with masks
    for steps in (0, 2):
        counts = ForwardCounts()
        run(model, TEXTS, counts=counts, steps=steps)
        passes = sum(min(steps or n, n) for text in masks for n in text)
        assert counts.forwards == passes + sum(len(text) - 1 for text in masks if text)


def test_sampled_text_does_not_depend_on_other_texts(model, monkeypatch):
    together = run(model, TEXTS, HOT, steps=3)
    assert run(model, TEXTS[::-1], HOT, steps=3) == together[::-1]
    assert run(model, TEXTS, HOT, seed=1, steps=3) != together
    assert len({tuple(text) for text in run(model, TEXTS[:1] * 5, HOT, steps=3)}) == 5
    monkeypatch.setattr(prompt_batches, "MAX_BATCH_TOKENS", 24)  # one text
    assert run(model, TEXTS, HOT, steps=3) == together


def test_later_tokens_have_no_effect_on_a_block(model):
    first, second = (
        texts_of("x" * 6 + "..." + "x" * 9 + "..")[0],
        texts_of("x" * 6 + "..." + "x" * 9 + "..")[0],
    )
    second[12:18] = [20] * 6
    unmasked = [run(model, [text])[0] for text in (first, second)]
    assert unmasked[0][:10] == unmasked[1][:10]
    assert unmasked[0] != unmasked[1]


def test_texts_are_yielded_while_they_are_unmasked(model):
    params = UnmaskingParams(block=BLOCK, steps=2)
    states = list(infill_blocks(*model, TEXTS, GREEDY, params, SPECIAL, yield_every=4))
    assert [state[0].count(MASK) for state in states] == [20, 14, 9, 2, 0]


def test_invalid_requests_are_rejected(model):
    with pytest.raises(UserError, match="block=0"):
        run(model, TEXTS, block=0)
    with pytest.raises(UserError, match="must start"):
        run(model, [[MASK, 20]])
