"""Self-speculative decoding: greedy equality, rollback of the cache, adaptation, batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import default_config, freeze
from dualsm.devices import sharding
from dualsm.generation import autoregressive, prompt_batches, speculative
from dualsm.generation.autoregressive import forward_with_cache
from dualsm.generation.draft_counts import DraftCounts, DraftRecord, DraftStep
from dualsm.generation.draft_sizes import adapted_draft
from dualsm.generation.prompt_batches import prompt_keys
from dualsm.generation.sampling_params import SamplingParams
from dualsm.generation.speculative import SpeculationParams, generate, speculate
from dualsm.model.transformer import bind, init_params
from dualsm.objectives.example import SpecialIds
from dualsm.process.errors import UserError
from tests.micro import micro_config

from .conftest import VOCABULARY

pytestmark = pytest.mark.slow

GREEDY, HOT, SPECIAL = SamplingParams(temperature=0), SamplingParams(temperature=5.0), SpecialIds()
NEW_TOKENS, LARGEST = 24, 16


def run(model, prompts, tokens=NEW_TOKENS, sampling=GREEDY, draft=0, seed=0, **options):
    options |= {"speculation": SpeculationParams(draft), "key_B": prompt_keys(seed, prompts)}
    return list(generate(model.config, model.params, prompts, tokens, sampling, SPECIAL, **options))[-1]


def causal(model, prompts, tokens=NEW_TOKENS):
    return list(autoregressive.generate(model.config, model.params, prompts, tokens, GREEDY, SPECIAL))[-1]


class RandomModel:
    """A model that is not trained.

    Without a bias its drafts are almost never accepted. With one, a few tokens are likely after every text,
    `</s>` among them, so that masks often predict the causal mode's token.
    """

    def __init__(self, bias: float):
        config = micro_config().model
        config.vocab_size = VOCABULARY
        self.config = freeze(config)
        params = init_params(config, jax.random.key(3))
        self.params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)
        bias_V = bias * jax.random.normal(jax.random.key(4), VOCABULARY)
        self.params["head"]["output"]["bias"] = bias_V.at[SPECIAL.eos].set(0.8 * bias_V.max())


@pytest.fixture(scope="module")
def models():
    return {"accepting": RandomModel(4.0), "rejecting": RandomModel(0.0)}


@pytest.fixture(scope="module")
def model(models):
    return models["accepting"]


def prompts_of(count):
    rng = np.random.default_rng(5)
    return [[2, *rng.integers(16, VOCABULARY, i % 20).tolist()] for i in range(count)]


@pytest.mark.parametrize("name", ["accepting", "rejecting"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_greedy_texts_equal_causal_ones_for_every_draft_size(models, name, batch_size):
    """One compiled function drafts any number of tokens up to its size."""
    model, prompts = models[name], prompts_of(32 if batch_size == 8 else 4)
    expected = causal(model, prompts)
    kept, compiled = set(), speculate._cache_size()
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        padded = [*part, [2] * 20]  # so that all batches have the same shape
        prompts_BxP, prompt_B = (a[:-1] for a in prompt_batches.pad_batch(padded, SPECIAL.pad))
        keys_B = prompt_keys(0, part)
        for draft in range(1, LARGEST + 1):
            state = speculative.start(
                model.config, model.params, prompts_BxP, prompt_B, keys_B, NEW_TOKENS, SPECIAL
            )
            state = speculate(
                model.config, model.params, state, np.full(batch_size, draft, np.int32),
                prompt_B + NEW_TOKENS, 99, size=LARGEST, sampling=GREEDY, special=SPECIAL,
            )  # fmt: skip
            texts = [
                row[:n].tolist() for row, n in zip(np.array(state.tokens_BxS), state.length_B, strict=True)
            ]
            assert texts == expected[first : first + batch_size]
            kept |= set((state.accepted_B / state.drafts_B).tolist())
    assert speculate._cache_size() <= compiled + 1  # both models have the same config
    assert max(kept) > (4 if name == "accepting" else 1)
    assert min(kept) == 1


@pytest.mark.parametrize("draft", [0, 3])
def test_greedy_texts_of_generate_equal_causal_ones(model, draft, monkeypatch):
    """Also in several batches, and with `</s>` inside a draft."""
    monkeypatch.setattr(prompt_batches, "MAX_BATCH_SIZE", 6)
    texts = run(model, prompts_of(12), draft=draft)
    assert texts == causal(model, prompts_of(12))
    ended = [text for text in texts if text[-1] == SPECIAL.eos]
    assert ended
    assert all(len(text) - 1 == text.index(SPECIAL.eos) for text in ended)


def test_logits_after_rejections_equal_uncached_ones(models):
    prompts_BxP, prompt_B = prompt_batches.pad_batch(prompts_of(6), SPECIAL.pad)
    rows = np.arange(6)

    @jax.jit
    def both(params, state):
        bound, end_S = bind(config, params), jnp.arange(1, state.tokens_BxS.shape[1] + 1)
        last_Bx1 = state.tokens_BxS[rows, state.length_B - 1][:, None]
        features_Bx1xD, _ = forward_with_cache(bound, last_Bx1, state.length_B - 1, None, state.cache)
        end_BxS = jnp.broadcast_to(end_S, state.tokens_BxS.shape)
        uncached = bound.logits(state.tokens_BxS, jnp.zeros_like(end_BxS), end_BxS)
        return bound.output_logits(features_Bx1xD)[:, 0], uncached[rows, state.length_B - 1]

    for model in models.values():
        config = model.config
        keys_B = prompt_keys(0, prompts_of(6))
        state = speculative.start(config, model.params, prompts_BxP, prompt_B, keys_B, 60, SPECIAL)
        for _ in range(4):
            state = speculate(
                config, model.params, state, np.full(6, 6, np.int32), prompt_B + 60, 1,
                size=6, sampling=HOT, special=SPECIAL,
            )  # fmt: skip
            cached, uncached = map(np.asarray, both(model.params, state))
            # Rounding is relative to the largest logits: where these are about 10, it may exceed 1e-4.
            np.testing.assert_allclose(cached, uncached, rtol=0, atol=2e-5 * np.abs(uncached).max())
        assert (state.accepted_B < 6 * state.drafts_B).all()


def test_sampled_text_does_not_depend_on_other_prompts(model, monkeypatch):
    prompts = prompts_of(12)[::4]
    for draft in (0, 5):
        alone = [run(model, [prompt], 12, HOT, draft)[0] for prompt in prompts]
        assert run(model, prompts, 12, HOT, draft) == alone
    assert run(model, prompts[::-1], 12, HOT, 5) == alone[::-1]
    monkeypatch.setattr(prompt_batches, "MAX_BATCH_SIZE", 1)
    assert run(model, prompts, 12, HOT, 5) == alone
    assert len({tuple(text) for text in run(model, prompts[:1] * 20, 12, HOT, 5)}) == 20
    assert run(model, prompts[:1], 12, HOT, 5, seed=1) != alone[:1]


def constant_model(token=40):
    """Returns a model that predicts the same token everywhere, and that token."""
    model = RandomModel(0.0)
    bias_V = np.zeros(VOCABULARY, np.float32)
    bias_V[token] = 1e4
    model.params["head"]["output"]["bias"] = jnp.asarray(bias_V)
    return model, token


def test_drafts_and_accepted_tokens_are_counted():
    model, token = constant_model()
    counts = DraftCounts()
    texts = run(model, [[2]] * 2, tokens=23, draft=4, counts=counts)
    assert texts == [[2] + [token] * 23] * 2
    # Each draft of four adds a fifth token; the last one has room for three tokens.
    assert counts == DraftCounts(drafts=2 * 5, accepted=2 * (4 * 4 + 3))


@pytest.mark.parametrize(("sampling", "draft"), [(GREEDY, 0), (HOT, 3)], ids=["greedy", "sampled"])
def test_recorded_drafts_are_the_pieces_of_the_texts(models, sampling, draft, monkeypatch):
    """Also in several batches and calls, and with `</s>` inside a draft."""
    monkeypatch.setattr(prompt_batches, "MAX_BATCH_SIZE", 6)
    prompts = prompts_of(12)
    for model in models.values():
        counts, record = DraftCounts(), DraftRecord()
        texts = run(model, prompts, sampling=sampling, draft=draft, counts=counts)
        recorded = [
            run(model, part, sampling=sampling, draft=draft, counts=record)
            for part in (prompts[:6], prompts[6:])
        ]
        assert sum(recorded, []) == texts
        pieces = [[token for step in steps for token in step.tokens] for steps in record.steps]
        assert [prompt + added for prompt, added in zip(prompts, pieces, strict=True)] == texts
        every = [step for steps in record.steps for step in steps]
        accepted = sum(len(step.accepted) for step in every)
        assert DraftCounts(len(every), accepted) == counts == DraftCounts(record.drafts, record.accepted)
        assert any(step.rejected for step in every)
        for steps in record.steps:
            room = NEW_TOKENS
            for step in steps:
                assert not draft or len(step.accepted + step.rejected) == min(draft, room)
                room -= len(step.tokens)
                if step.rejected and step.accepted[-1] != SPECIAL.eos:
                    # The token is drawn from max(p - q, 0), which is 0 for the rejected token.
                    assert step.next_token not in (None, step.rejected[0])


def test_a_record_ends_where_the_text_ends():
    """At its maximum length, or at `</s>`; tokens after `</s>` are not kept, even if accepted."""
    record, (model, token) = DraftRecord(), constant_model()
    run(model, [[2]] * 2, tokens=23, draft=4, counts=record)
    steps = [DraftStep([token] * 4, [], token)] * 4 + [DraftStep([token] * 3, [], None)]
    assert record == DraftRecord(drafts=2 * 5, accepted=2 * (4 * 4 + 3), steps=[steps] * 2)
    record, (model, token) = DraftRecord(), constant_model(SPECIAL.eos)
    run(model, [[2]] * 2, tokens=23, draft=4, counts=record)
    assert record == DraftRecord(drafts=2, accepted=2, steps=[[DraftStep([token], [token] * 3, None)]] * 2)


def test_draft_size_adapts_to_the_acceptance_rate():
    never, always = np.array([[0.0, 19.0]]), np.array([[300.0, 300.0]])
    assert adapted_draft(never).tolist() == [2]
    assert adapted_draft(always).tolist() == [16]
    sizes = adapted_draft(np.stack([np.linspace(0, 99, 50), np.full(50, 100.0)], axis=1)).tolist()
    assert sizes == sorted(sizes)
    assert set(sizes) > {2, 3, 4, 5}
    counts = DraftCounts()
    run(constant_model()[0], [[2]], tokens=100, counts=counts, yield_every=2)
    assert counts.accepted / counts.drafts > 6  # the first drafts have three tokens


def test_few_programs_are_compiled(model):
    """One per draft size, also with sharded parameters, as in an opened run."""
    mesh = sharding.make_mesh(default_config().mesh, jax.devices()[:1])
    params = jax.device_put(model.params, sharding.tree_shardings(mesh, model.params))
    sampling, draft = SamplingParams(temperature=3.0, top_k=50), SpeculationParams(2)  # used in no other test
    before = speculate._cache_size()
    states = generate(model.config, params, [[2]] * 3, 20, sampling, SPECIAL, draft, yield_every=1)
    assert len(list(states)) > 5
    assert speculate._cache_size() == before + 1


def test_invalid_requests_are_rejected(model):
    with pytest.raises(UserError, match="empty prompt"):
        run(model, [[]])
    for draft in (-1, 65):
        with pytest.raises(UserError, match=f"draft={draft}"):
            SpeculationParams(draft)


def test_memory_is_bounded_for_many_prompts_and_a_large_vocabulary(model, monkeypatch):
    """The distributions of 16 drafted tokens of each of 256 texts would take 140 MB per array."""
    sizes = []

    def started(config, params, prompts_BxP, prompt_B, *_):
        sizes.append(len(prompt_B))
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(speculative, "start", started)
        for draft in (1, 0):
            with pytest.raises(InterruptedError):
                run(model, [[2]] * 500, 8, draft=draft)
    assert sizes == [256, 60]
    config = micro_config().model
    config.vocab_size = 8192
    config = freeze(config)
    params = init_params(config, jax.random.key(0))
    prompts_BxP, prompt_B = prompt_batches.pad_batch([[2] * 8] * sizes[-1], SPECIAL.pad)
    keys_B = prompt_keys(0, prompts_BxP)
    state = speculative.start(config, params, prompts_BxP, prompt_B, keys_B, 8, SPECIAL)
    options = {"size": LARGEST, "sampling": SamplingParams(0.8, 50, 0.95), "special": SPECIAL}
    compiled = speculate.lower(config, params, state, prompt_B, prompt_B, 1, **options).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 2**20
