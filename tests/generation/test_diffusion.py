"""Generation by unmasking: infilling, orders, blocks, thresholds, memory."""

import jax
import numpy as np
import pytest

from dualsm.config import default_config, freeze
from dualsm.devices import sharding
from dualsm.generation import prompt_batches
from dualsm.generation.diffusion import ORDERS, DiffusionState, UnmaskingParams, infill, unmask
from dualsm.generation.prompt_batches import prompt_keys
from dualsm.generation.sampling_params import SamplingParams
from dualsm.model.transformer import bind, init_params
from dualsm.objectives.example import SpecialIds
from dualsm.process.errors import UserError
from tests.micro import micro_config

GREEDY, SPECIAL = SamplingParams(temperature=0), SpecialIds()
MASK = SPECIAL.mask


def states(model, texts, sampling=GREEDY, seed=0, **unmasking):
    key_B = prompt_keys(seed, texts)
    return list(
        infill(model.config, model.params, texts, sampling, UnmaskingParams(**unmasking), SPECIAL, key_B)
    )


def hide(text, *places):
    return [MASK if i in places else token for i, token in enumerate(text)]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_masked_spans_of_a_memorized_text_are_restored_exactly(memorized, steps):
    text = memorized.text
    for places in (range(5, 13), [1, 8, 9, 20, 30], [15]):
        assert states(memorized, [hide(text, *places)], steps=steps)[-1] == [text]


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_unmasks_all_masks_and_keeps_the_other_tokens(memorized, order):
    rng = np.random.default_rng(0)
    texts = [[2, *rng.integers(16, 64, n).tolist()] for n in (12, 25)]
    masked = [hide(text, 3, 4, 5, 9) for text in texts]
    result = states(memorized, masked, SamplingParams(temperature=1.0), order=order)[-1]
    for before, after in zip(masked, result, strict=True):
        assert len(before) == len(after)
        assert all(a == b for a, b in zip(before, after, strict=True) if b is not None and a != MASK)
        assert all(token >= 16 for token in after[1:])


def masks_left(history, row=0):
    return [state[row].count(MASK) for state in history]


def test_number_of_forward_passes_equals_steps(memorized):
    text = hide(memorized.text, *range(5, 21))  # 16 masks
    assert masks_left(states(memorized, [text])) == list(range(16, -1, -1))
    assert masks_left(states(memorized, [text], steps=4)) == [16, 12, 8, 4, 0]
    assert masks_left(states(memorized, [text], steps=1)) == [16, 0]
    assert masks_left(states(memorized, [text], steps=5)) == [16, 12, 9, 6, 3, 0]
    assert masks_left(states(memorized, [text], steps=100))[-1] == 0


def test_blocks_are_unmasked_left_to_right(memorized):
    text = hide(memorized.text, *range(5, 21))
    history = states(memorized, [text], block=4, steps=2)
    assert masks_left(history) == [16, 14, 12, 10, 8, 6, 4, 2, 0]
    for done, state in enumerate(history):
        settled = [i for i in range(5, 21) if state[0][i] != MASK]
        begun = -(-done // 2)
        assert set(settled) <= set(range(5, 5 + 4 * begun))
        assert set(settled) >= set(range(5, 5 + 4 * (done // 2)))


def test_threshold_unmasks_all_likely_tokens_and_at_least_one(memorized):
    text = hide(memorized.text, *range(5, 21))
    sure = masks_left(states(memorized, [text], threshold=0.5))
    assert sure[-1] == 0
    assert len(sure) < 6  # a memorized text needs few forward passes
    impossible = masks_left(states(memorized, [text], threshold=1.0))
    assert max(a - b for a, b in zip(impossible, impossible[1:], strict=False)) <= 16
    rng = np.random.default_rng(0)
    unsure = [2, *hide(rng.integers(16, 64, 12).tolist(), 2, 3, 4, 5)]
    assert masks_left(states(memorized, [unsure], SamplingParams(temperature=30.0), threshold=0.999)) == [
        4,
        3,
        2,
        1,
        0,
    ]


def test_confidence_unmasks_the_most_likely_token_first(memorized):
    text = hide(memorized.text, 6, 7, 8, 9, 25)
    model = bind(memorized.config, memorized.params)
    zeros = np.zeros((1, len(text)), np.int32)
    logits = np.roll(model.logits(np.array([text]), zeros, zeros + len(text))[0], 1, axis=0)
    logits[:, :16] = -np.inf
    probability = np.asarray(jax.nn.softmax(logits)).max(-1)
    places = [i for i, token in enumerate(text) if token == MASK]
    first = states(memorized, [text], order="confidence")[1][0]
    assert [i for i in places if first[i] != MASK] == [max(places, key=lambda i: probability[i])]


def test_texts_with_different_numbers_of_masks_share_a_batch(memorized):
    texts = [hide(memorized.text, *range(5, 13)), hide(memorized.text, 7), memorized.text[:20]]
    assert states(memorized, texts, steps=4)[-1] == [memorized.text, memorized.text, memorized.text[:20]]


@pytest.mark.parametrize("order", ["confidence", "random"])
def test_sampled_text_does_not_depend_on_other_texts(memorized, order, monkeypatch):
    hot, options = SamplingParams(temperature=5.0), {"order": order, "steps": 3}
    texts = [
        hide(memorized.text, *range(5, 13)),
        hide(memorized.text[:20], 7, 8),
        memorized.text[:4] + [MASK] * 9,
    ]
    alone = [states(memorized, [text], hot, **options)[-1][0] for text in texts]
    assert states(memorized, texts, hot, **options)[-1] == alone
    assert states(memorized, texts[::-1], hot, **options)[-1] == alone[::-1]
    monkeypatch.setattr(prompt_batches, "MAX_BATCH_TOKENS", 70)  # two texts of 33 tokens
    assert states(memorized, texts, hot, **options)[-1] == alone
    same = states(memorized, texts[:1] * 8, hot, **options)[-1]
    assert len({tuple(text) for text in same}) == 8


def test_memory_is_bounded_for_many_prompts_and_a_large_vocabulary():
    """All logits of 400 texts of 160 tokens would take 2 GB, and sampling eight times as much."""
    config = micro_config().model
    config.vocab_size = 8192
    config = freeze(config)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    part = next(prompt_batches.batch_slices(400, 160))
    tokens_BxL, length_B = prompt_batches.pad_batch([[2] * 160] * len(range(400)[part]), SPECIAL.pad)
    state = DiffusionState(
        tokens_BxL, length_B, tokens_BxL, tokens_BxL, prompt_keys(0, tokens_BxL), np.int32(0)
    )
    options = {"sampling": SamplingParams(0.8, 50, 0.95), "unmasking": UnmaskingParams(), "special": SPECIAL}
    compiled = unmask.lower(config, params, state, steps=1, **options).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 2**20


def test_text_that_starts_with_a_mask_is_rejected(memorized):
    with pytest.raises(UserError, match="must start"):
        states(memorized, [[MASK, 20]])
    with pytest.raises(UserError, match="telepathy"):
        UnmaskingParams(order="telepathy")


def test_all_forward_passes_run_one_program(memorized):
    """Also with sharded parameters, as in an opened run."""
    mesh = sharding.make_mesh(default_config().mesh, jax.devices()[:1])
    params = jax.device_put(memorized.params, sharding.tree_shardings(mesh, memorized.params))
    before = unmask._cache_size()
    text = hide(memorized.text, *range(5, 13))
    unmasking = UnmaskingParams(order="margin", steps=3)  # used in no other test
    history = list(infill(memorized.config, params, [text], GREEDY, unmasking, SPECIAL))
    assert len(history) == 4
    assert unmask._cache_size() == before + 1
