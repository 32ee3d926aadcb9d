"""Left-to-right generation: the cache, batches of prompts, sampling parameters, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.generation import prompt_batches
from dualsm.generation.autoregressive import forward_with_cache, generate, prefill
from dualsm.generation.prompt_batches import prompt_keys
from dualsm.generation.sampling_params import SamplingParams, sample
from dualsm.model.transformer import bind
from dualsm.objectives.example import SpecialIds
from dualsm.process.errors import UserError

from .conftest import VOCABULARY

GREEDY, SPECIAL = SamplingParams(temperature=0), SpecialIds()


def last(texts):
    return list(texts)[-1]


def run(model, prompts, tokens=40, sampling=GREEDY, seed=0, **options):
    options |= {"key_B": prompt_keys(seed, prompts)}
    return last(generate(model.config, model.params, prompts, tokens, sampling, SPECIAL, **options))


def test_memorized_text_is_continued_exactly(memorized):
    for mode in ("causal", "prefix"):
        for start in (4, 15):
            assert run(memorized, [memorized.text[:start]], mode=mode) == [memorized.text]


def test_prompts_of_different_lengths_share_a_batch(memorized):
    prompts = [memorized.text[:n] for n in (2, 9, 20, 5)]
    together = run(memorized, prompts)
    assert together == [run(memorized, [prompt])[0] for prompt in prompts]


def test_number_of_new_tokens_is_limited(memorized):
    prompts = [memorized.text[:n] for n in (2, 9, 20)]
    for text, prompt in zip(run(memorized, prompts, tokens=5), prompts, strict=True):
        assert text == memorized.text[: len(prompt) + 5]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_cached_logits_equal_uncached_ones(memorized, bidirectional):
    model, text = bind(memorized.config, memorized.params), memorized.text
    rng = np.random.default_rng(1)
    texts = rng.integers(16, VOCABULARY, (3, 20))
    lengths = np.array([4, 11, 1], np.int32)
    state = prefill(
        memorized.config, memorized.params, texts[:, :11], lengths, prompt_keys(0, texts),
        size=20, bidirectional=bidirectional, special=SPECIAL,
    )  # fmt: skip
    cache, position_B, logits = state.cache, lengths, [state.logits_BxV]
    for step in range(8):
        tokens_Bx1 = texts[np.arange(3), lengths + step][:, None]
        features, cache = forward_with_cache(model, tokens_Bx1, position_B, None, cache)
        logits.append(model.head.output(features[:, 0]))
        position_B = position_B + 1
    for b in range(3):
        ends = jnp.arange(1, 21)
        ends = jnp.maximum(ends, lengths[b]) if bidirectional else ends
        whole = model.logits(texts[b : b + 1], jnp.zeros((1, 20), jnp.int32), ends[None])[0]
        ours = jnp.stack([step[b] for step in logits])
        np.testing.assert_allclose(ours, whole[lengths[b] - 1 : lengths[b] + 8], atol=1e-4)
    assert len(text) == 33


def test_samples_at_temperature_one_follow_the_distribution():
    logits_V = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 20_000)

    def shares(**sampling):
        drawn = jax.vmap(lambda key: sample(logits_V, key, SamplingParams(**sampling)))(keys)
        return np.bincount(np.asarray(drawn), minlength=4) / len(keys)

    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.015)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.015)
    np.testing.assert_allclose(shares(top_p=0.79), [0.625, 0.375, 0, 0], atol=0.015)
    np.testing.assert_allclose(shares(top_p=0.81), [0.526, 0.316, 0.158, 0], atol=0.015)
    np.testing.assert_allclose(shares(top_p=0.01), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(top_p=1e-46), [1, 0, 0, 0])  # 0 in float32
    # Of the two tokens that top_k keeps, the first has a probability of 0.625.
    np.testing.assert_allclose(shares(top_k=2, top_p=0.6), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(top_k=2, top_p=0.63), [0.625, 0.375, 0, 0], atol=0.015)
    for temperature in (0, 1e-40, 1e-6):
        np.testing.assert_allclose(shares(temperature=temperature), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(temperature=1e38), [0.25] * 4, atol=0.015)
    cold = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(shares(temperature=0.5), cold / cold.sum(), atol=0.015)


def test_reserved_ids_are_never_sampled(memorized):
    hot = SamplingParams(temperature=50.0)
    texts = run(memorized, [[2]] * 8, tokens=30, sampling=hot)
    for text in texts:
        assert all(token >= 16 for token in text[1:-1])
        assert text[-1] >= 16 or text[-1] == SPECIAL.eos


def test_samples_depend_on_the_seed(memorized):
    hot = SamplingParams(temperature=5.0)
    texts = [run(memorized, [[2]], sampling=hot, seed=seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("mode", ["causal", "prefix"])
def test_sampled_text_does_not_depend_on_other_prompts(memorized, mode, monkeypatch):
    hot = SamplingParams(temperature=5.0)
    prompts = [memorized.text[:n] for n in (2, 9, 4)]
    alone = [run(memorized, [prompt], 12, hot, mode=mode)[0] for prompt in prompts]
    assert run(memorized, prompts, 12, hot, mode=mode) == alone
    assert run(memorized, prompts[::-1], 12, hot, mode=mode) == alone[::-1]
    monkeypatch.setattr(prompt_batches, "MAX_BATCH_TOKENS", 50)  # two texts of 9 + 12 tokens
    assert prompt_batches.max_batch_size(21) == 2
    assert run(memorized, prompts, 12, hot, mode=mode) == alone


def test_equal_prompts_get_different_texts(memorized):
    prompts = [memorized.text[:2]] * 40
    texts = run(memorized, prompts, 12, SamplingParams(temperature=5.0))
    assert len({tuple(text) for text in texts}) == 40


def test_many_prompts_are_divided_into_batches_of_bounded_size():
    parts = list(prompt_batches.batch_slices(400, 160))
    assert [i for part in parts for i in range(400)[part]] == list(range(400))
    assert max(part.stop - part.start for part in parts) == prompt_batches.max_batch_size(160) == 102
    assert prompt_batches.max_batch_size(10**6) == 1
    assert prompt_batches.max_batch_size(2) == prompt_batches.MAX_BATCH_SIZE  # bounds the memory of logits


def test_texts_are_yielded_while_they_are_generated(memorized):
    states = list(
        generate(memorized.config, memorized.params, [memorized.text[:4]], 20, GREEDY, SPECIAL, yield_every=4)
    )
    assert [len(state[0]) for state in states] == [4, 8, 12, 16, 20, 24]
    assert all(state[0] == memorized.text[: len(state[0])] for state in states)


def test_invalid_requests_are_rejected(memorized):
    with pytest.raises(UserError, match="empty prompt"):
        run(memorized, [[]])
    with pytest.raises(UserError, match="telepathy"):
        run(memorized, [[2]], mode="telepathy")
    for top_p in (0.0, float("nan")):
        with pytest.raises(UserError, match="top_p"):
            SamplingParams(top_p=top_p)
    for temperature in (float("nan"), float("inf"), -1.0, 1e39):  # the last is infinite in float32
        with pytest.raises(UserError, match="temperature"):
            SamplingParams(temperature=temperature)
