"""Block diffusion: the bound, by enumeration; limits of the block size; the inputs of a draft."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import freeze
from dualsm.generation import drafting
from dualsm.generation.autoregressive import prefill
from dualsm.generation.prompt_batches import prompt_keys
from dualsm.model.transformer import bind

from .conftest import SPECIAL, batch, far_from_initial, packed, rewritten, tiny_model

LENGTH, BLOCK = 4, 2
TOKENS = (16, 17)  # all ids that the enumerated model can predict
TEXTS = list(itertools.product(TOKENS, repeat=LENGTH))
# Predicting positions of the tokens in each block of inputs: x_1 | x_2, x_3 | x_4. The last token is in a
# third block, which is not an input.
BLOCKS = ((0,), (1, 2), (3,))
SUBSETS = [s for s in itertools.product([False, True], repeat=LENGTH) if any(s)]


def block_ends(length: int, block: int) -> np.ndarray:
    """Returns the end of the block at each position of one document of `length` tokens."""
    return np.minimum((np.arange(length) // block + 1) * block, length)


@pytest.fixture(scope="module")
def nll():
    """Returns the nll of every text's tokens for every set of masked ones: text -> subset -> float64 [L]."""
    config = tiny_model(18, width=8)
    config.never_predicted = "0-15"
    params = far_from_initial(config, 0.5)
    rows = [(text, subset) for text in TEXTS for subset in SUBSETS]
    inputs_BxL = np.array([[2, *text[:-1]] for text, _ in rows])
    masked_BxL = np.array([subset for _, subset in rows])
    inputs_BxL[:, 1:][masked_BxL[:, :-1]] = SPECIAL.mask
    end_BxL = np.tile(block_ends(LENGTH, BLOCK), (len(rows), 1))
    logits = jax.jit(lambda params: bind(config, params).logits(inputs_BxL, np.zeros_like(end_BxL), end_BxL))(
        params
    )
    log_p_BxLxV = np.asarray(jax.nn.log_softmax(logits), np.float64)
    targets_BxLx1 = np.array([text for text, _ in rows])[..., None]
    nll_BxL = -np.take_along_axis(log_p_BxLxV, targets_BxLx1, axis=2)[..., 0]
    found = {text: {} for text in TEXTS}
    for (text, subset), nll_L in zip(rows, nll_BxL, strict=True):
        found[text][subset] = nll_L
    return found


def of_row(subset) -> float:
    """Returns the probability that the objective masks a subset."""
    return 1 / LENGTH / math.comb(LENGTH, sum(subset))


def of_blocks(subset) -> float:
    """Returns the probability of a subset if each block draws its own number of masks, uniform on 1..n."""
    chance = 1.0
    for block in BLOCKS:
        masks = sum(subset[i] for i in block)
        chance *= masks and 1 / len(block) / math.comb(len(block), masks)
    return chance


def row_weights(subset) -> np.ndarray:
    """Returns the weights n/k of the masked tokens, [L]."""
    return np.array(subset) * LENGTH / sum(subset)


def block_weights(subset) -> np.ndarray:
    """Returns the weights n/k of the masked tokens, with n and k of each token's block, [L]."""
    weights_L = np.zeros(LENGTH)
    for block in BLOCKS:
        if masks := sum(subset[i] for i in block):
            weights_L[list(block)] = len(block) / masks
    return weights_L * subset


def expected_loss(nll_of_subset, chance, weights) -> float:
    """Returns the mean over subsets of the weighted nll of a text, in nats."""
    return sum(chance(s) * float(weights(s) @ nll_of_subset(s)) for s in SUBSETS)


def log_p_of_orders(nll, text, orders) -> list[float]:
    """Returns the log-probability of a text if its tokens are generated in each of the given orders."""
    found = []
    for order in orders:
        total = 0.0
        for t, i in enumerate(order):
            masked = tuple(j in order[t:] for j in range(LENGTH))
            total -= nll[text][masked][i]
        found.append(total)
    return found


def test_the_loss_is_a_likelihood_bound(nll):
    """It is the mean nll over all orders of generation; each order has a normalized distribution."""
    orders = list(itertools.permutations(range(LENGTH)))
    log_p_TxO = np.array([log_p_of_orders(nll, text, orders) for text in TEXTS])
    np.testing.assert_allclose(np.exp(log_p_TxO).sum(0), 1, atol=1e-5)
    losses_T = np.array([expected_loss(nll[text].__getitem__, of_row, row_weights) for text in TEXTS])
    np.testing.assert_allclose(losses_T, -log_p_TxO.mean(1), atol=1e-5)
    bounded_T = -np.log(np.exp(log_p_TxO).mean(1))
    assert (losses_T > bounded_T).all()
    assert np.exp(-losses_T).sum() < 0.999


def test_examples_have_the_enumerated_masks_weights_and_key_ranges():
    draws, text = 4000, TEXTS[5]
    row = np.array([2, *text], np.int32), np.zeros(LENGTH + 1, np.int32)
    example = rewritten("block_diffusion", batch([row] * draws), block=BLOCK)
    np.testing.assert_array_equal(example.key_end_L, np.tile(block_ends(LENGTH, BLOCK), (draws, 1)))
    assert (example.loss_denominator_L == 1).all()
    seen = 0
    for subset in SUBSETS:
        chosen_B = ((example.weights_L > 0) == np.array(subset)).all(1)
        assert abs(chosen_B.mean() - of_row(subset)) < 4 * math.sqrt(of_row(subset) / draws)
        np.testing.assert_allclose(
            example.weights_L[chosen_B], np.tile(row_weights(subset), (chosen_B.sum(), 1))
        )
        seen += chosen_B.sum()
    assert seen == draws


def test_independent_noise_per_block_needs_the_weights_of_the_block(nll):
    """With the weights n/k of the row it is not a bound; with those of each block it is another bound."""
    assert sum(map(of_blocks, SUBSETS)) == pytest.approx(1)
    # Each token must have a mean weight of 1: otherwise the nll of independent tokens is not the loss.
    for chance, weights, exact in (
        (of_row, row_weights, True),
        (of_blocks, block_weights, True),
        (of_blocks, row_weights, False),
    ):
        mean_L = sum(chance(s) * weights(s) for s in SUBSETS)
        np.testing.assert_allclose(mean_L, np.ones(LENGTH) if exact else [7 / 6, 5 / 6, 5 / 6, 7 / 6])
        # Tokens that are independent: the first and last are known, the others are not.
        losses_T = []
        for text in TEXTS:
            nll_L = np.array(
                [0 if text[0] == 16 else np.inf, np.log(2), np.log(2), 0 if text[3] == 16 else np.inf]
            )
            with np.errstate(invalid="ignore"):
                losses_T.append(np.nansum(mean_L * nll_L))
        total = np.exp(-np.array(losses_T)).sum()
        assert total == pytest.approx(1) if exact else total > 1.25
    whole_T, own_T = (
        np.array([expected_loss(nll[text].__getitem__, *noise) for text in TEXTS])
        for noise in ((of_row, row_weights), (of_blocks, block_weights))
    )
    assert np.exp(-own_T).sum() < 0.999
    assert np.abs(own_T - whole_T).max() > 0.01


@pytest.mark.parametrize("block", [24, 25, 2**31 - 1])
def test_one_block_is_masked_diffusion_bit_for_bit(block):
    rows = batch([packed([9, 1, 30], 24, seed) for seed in range(10)] + [packed([6, 8], 24)])
    plain, blocked = rewritten("masked_diffusion", rows), rewritten("block_diffusion", rows, block=block)
    jax.tree.map(np.testing.assert_array_equal, plain, blocked)


def test_blocks_of_one_token_are_causal_prediction_of_masked_inputs():
    rows = batch([packed([9, 1, 30], 24, seed) for seed in range(10)])
    masked, causal = rewritten("masked_diffusion", rows), rewritten("causal", rows)
    expected = masked._replace(key_start_L=causal.key_start_L, key_end_L=causal.key_end_L)
    jax.tree.map(np.testing.assert_array_equal, expected, rewritten("block_diffusion", rows, block=1))


@pytest.mark.parametrize("form", ["noisy", "tail"])
def test_block_sizes_are_powers_of_two_drawn_equally_often(form):
    rows, length = 3000, 24
    example = rewritten("block_diffusion", batch([packed([40], length)] * rows), block=0, form=form)
    if form == "noisy":
        size_B = example.key_end_L[:, 0]
        assert (example.key_end_L == np.stack([block_ends(length, size) for size in size_B])).all()
        masks_B = (example.weights_L > 0).sum(1)
        assert np.bincount(masks_B)[1:].tolist() == [rows // length] * length  # stratified
    else:
        size_B = (example.weights_L > 0).sum(1)
        size_B = size_B[np.argmax(example.weights_L > 0, axis=1) + 16 <= length]  # not cut by the end
    sizes, counts = np.unique(size_B, return_counts=True)
    assert sizes.tolist() == [1, 2, 4, 8, 16]
    assert np.abs(counts - len(size_B) / 5).max() < 4 * math.sqrt(len(size_B) / 5)


def test_a_tail_is_one_block_after_a_random_cut_in_each_document():
    lengths, length, block, draws = [9, 1, 2, 30], 24, 4, 3000
    tokens_L1, documents_L1 = packed(lengths, length)
    has_target_L = documents_L1[1:] == documents_L1[:-1]
    rows = batch([(tokens_L1, documents_L1)] * draws)
    example = rewritten("block_diffusion", rows, block=block, form="tail")
    np.testing.assert_array_equal(example.targets_L, np.tile(tokens_L1[1:], (draws, 1)))
    np.testing.assert_array_equal(example.loss_denominator_L, np.tile(has_target_L, (draws, 1)))
    assert not example.weights_L[:, 9].any()  # a document of one token
    for start, end in ((0, 9), (10, 12), (12, length + 1)):
        part_BxL = example.weights_L[:, start : end - 1]
        cut_B = 1 + np.argmax(part_BxL > 0, axis=1)  # tokens of the document before the block
        counts = np.bincount(cut_B, minlength=end - start)[1:]
        assert len(counts) == end - start - 1
        assert np.abs(counts - draws / len(counts)).max() < 5 * math.sqrt(draws / len(counts))
        for b in range(100):
            cut, last = cut_B[b], min(cut_B[b] + block, end - start) - 1
            inside_L = np.arange(end - start - 1)
            scored_L = (inside_L >= cut - 1) & (inside_L < last)
            np.testing.assert_allclose(part_BxL[b], scored_L * (end - start - 1) / scored_L.sum())
            hidden_L = (inside_L >= cut) & (inside_L < last)
            shown_L = tokens_L1[start : end - 1]
            np.testing.assert_array_equal(
                example.inputs_L[b, start : end - 1], np.where(hidden_L, SPECIAL.mask, shown_L)
            )
            ends_L = np.where(hidden_L, last, inside_L + 1)
            np.testing.assert_array_equal(example.key_end_L[b, start : end - 1], start + ends_L)


def test_a_tail_does_not_depend_on_later_tokens(params, score):
    rows = batch([packed([40], 24, seed) for seed in range(32)])
    example = rewritten("block_diffusion", rows, block=4, form="tail")
    after_B = 25 - np.argmax(example.weights_L[:, ::-1] > 0, axis=1)  # position after the last target
    is_later_BxL = np.arange(24) >= after_B[:, None] - 1
    assert is_later_BxL.sum() > 100
    other = example._replace(inputs_L=np.where(is_later_BxL, 20, example.inputs_L))
    nll_B, other_nll_B = (score(params, e)[2].nll_B for e in (example, other))
    np.testing.assert_array_equal(nll_B, other_nll_B)
    earlier_L = example.inputs_L.copy()
    earlier_L[:, 0] = 20
    assert (score(params, example._replace(inputs_L=earlier_L))[2].nll_B != nll_B).all()


def test_special_tokens_in_a_tail_are_neither_masked_nor_predicted():
    """Except for the last target, which is not an input."""
    tokens_L1, documents_L1 = packed([25], 24)
    tokens_L1[[5, 11, 24]] = SPECIAL.eos
    rows = batch([(tokens_L1, documents_L1)] * 300)
    example = rewritten("block_diffusion", rows, block=4, form="tail")
    np.testing.assert_array_equal(example.inputs_L[:, [5, 11]], SPECIAL.eos)
    last_B = 24 - np.argmax(example.weights_L[:, ::-1] > 0, axis=1)
    for position in (5, 11, 24):
        scored_B = example.weights_L[:, position - 1] > 0
        assert scored_B.any()
        assert (last_B[scored_B] == position).all()


def test_a_tail_has_the_inputs_and_logits_of_a_draft(model_config, params):
    """With the causal cache, as in speculative decoding."""
    block, config = 5, freeze(model_config)
    rows = batch([packed([40], 24, seed) for seed in range(16)])
    example = rewritten("block_diffusion", rows, block=block, form="tail")
    first_B = np.argmax(example.weights_L > 0, axis=1)
    chosen_B = np.flatnonzero(first_B + block <= 24)
    assert len(chosen_B) > 5
    positions_BxP = first_B[chosen_B, None] + np.arange(block)

    @jax.jit
    def both(params, cache):
        model = bind(config, params)
        whole = model.logits(example.inputs_L, example.key_start_L, example.key_end_L)
        tokens_BxL = np.asarray(rows.tokens_L1)[chosen_B, :-1]
        length_B = jnp.asarray(first_B[chosen_B] + 1)
        features_BxPxD, _ = drafting.draft_features(
            model, tokens_BxL[np.arange(len(chosen_B)), first_B[chosen_B]], length_B,
            jnp.full(len(chosen_B), block), cache, size=block, mask=SPECIAL.mask,
        )  # fmt: skip
        return whole[chosen_B[:, None], positions_BxP], model.output_logits(features_BxPxD)

    tokens_BxL = np.asarray(rows.tokens_L1)[chosen_B, :-1]
    state = prefill(
        config, params, tokens_BxL, np.full(len(chosen_B), 24, np.int32), prompt_keys(0, tokens_BxL),
        size=24 + block, bidirectional=False, special=SPECIAL,
    )  # fmt: skip
    np.testing.assert_allclose(*both(params, state.cache), atol=1e-4)
