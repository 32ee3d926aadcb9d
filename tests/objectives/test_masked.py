"""Masked language modeling and masked inputs: amount, positions, spans and replacements."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.objectives.example import SpecialIds, single_row
from dualsm.objectives.masked import masked, tile

from .conftest import SPECIAL, VOCABULARY, batch, packed, rewritten

ROWS, LENGTH = 400, 48


def rows_of(*lengths: int, progress: float = 0.0):
    return batch([packed([*lengths, 1], LENGTH, seed) for seed in range(ROWS)], progress)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.30), (0.5, 0.225), (1.0, 0.15)])
def test_the_masked_fraction_falls_from_30_to_15_percent(progress, share):
    masked_BxL = rewritten("masked", rows_of(100, progress=progress)).weights_L > 0
    counts_B = masked_BxL.sum(1)
    assert set(counts_B) <= {math.floor(LENGTH * share), math.ceil(LENGTH * share)}
    # Rounding is stratified over the batch, so the mean is exact up to one row.
    assert abs(counts_B.sum() - ROWS * LENGTH * share) <= 1.5


def test_the_options_set_the_ends_of_the_schedule():
    counts_B = rewritten("masked", rows_of(100, progress=0.5), first=0.5, last=0.25).weights_L.sum(1)
    assert counts_B.mean() == pytest.approx(0.375 * LENGTH, abs=0.01)


def runs(flags_L: np.ndarray) -> list[int]:
    """Lengths of the runs of true values."""
    return [len(list(group)) for value, group in itertools.groupby(flags_L) if value]


def test_span_lengths_are_uniform_and_spans_stay_in_their_document():
    _, documents_L1 = packed([13, 20, 100], LENGTH)
    tiles = jax.vmap(lambda key: tile(key, jnp.asarray(documents_L1), 3))
    first_BxL1 = np.asarray(tiles(jax.random.split(jax.random.key(0), 2000)))
    inside, lengths = [], []
    for first_L1 in first_BxL1:
        begins, sizes = np.unique(first_L1, return_counts=True)
        assert {0, 13, 33} <= set(begins)  # a document begins a span
        inside += [size for begin, size in zip(begins, sizes, strict=True) if 34 <= begin < LENGTH - 3]
        lengths += sizes.tolist()
    assert set(lengths) == {1, 2, 3}
    shares = np.bincount(inside)[1:] / len(inside)
    # A span may be cut before 34, so that lengths are not exactly uniform just after it.
    np.testing.assert_allclose(shares, 1 / 3, atol=0.02)


def test_whole_spans_are_masked_and_the_last_one_is_cut():
    """Masks few tokens, so that spans rarely touch and runs have the lengths of spans."""
    rows = rows_of(100)

    def lengths(**options) -> list[int]:
        return [n for r in rewritten("masked", rows, first=0.1, **options).weights_L for n in runs(r > 0)]

    spans, single = lengths(), lengths(span=1)
    assert np.mean(spans) > 1.6
    assert 0.1 < np.mean(np.array(spans) == 3) < 0.4
    assert np.mean(np.array(spans) > 3) < 0.15
    assert np.mean(single) < 1.2


def test_eight_of_ten_spans_become_masks_one_random_and_one_stays():
    rows = rows_of(100)
    example = rewritten("masked", rows)
    shown_BxL = np.asarray(rows.tokens_L1)[:, 1:-1]  # the original input at the position of each target
    inputs_BxL, masked_BxL = example.inputs_L[:, 1:], example.weights_L[:, :-1] > 0
    assert (inputs_BxL == shown_BxL)[~masked_BxL].all()
    inputs, shown = inputs_BxL[masked_BxL], shown_BxL[masked_BxL]
    n = len(inputs)
    text = VOCABULARY - 16
    for share, expected in (
        ((inputs == SPECIAL.mask).mean(), 0.8),
        ((inputs == shown).mean(), 0.1 + 0.1 / text),
        (((inputs != SPECIAL.mask) & (inputs != shown)).mean(), 0.1 * (text - 1) / text),
    ):
        # A span of two tokens on average has one draw.
        assert abs(share - expected) < 4 * math.sqrt(2 * expected * (1 - expected) / n)
    random = inputs[(inputs != SPECIAL.mask) & (inputs != shown)]
    assert random.min() == 16
    assert random.max() == VOCABULARY - 1


@pytest.mark.parametrize(
    ("options", "seen"), [({"random": 0.5, "keep": 0.5}, "random"), ({"random": 0.0, "keep": 1.0}, "kept")]
)
def test_replacement_follows_its_options(options, seen):
    rows = rows_of(100)
    inputs_BxL = rewritten("masked", rows, **options).inputs_L
    assert not (inputs_BxL == SPECIAL.mask).any()
    unchanged = (inputs_BxL == np.asarray(rows.tokens_L1)[:, :-1]).mean()
    assert (unchanged == 1) == (seen == "kept")


def test_random_tokens_need_the_vocabulary_size():
    row = single_row(*packed([40], LENGTH))
    with pytest.raises(ValueError, match="vocab_size"):
        masked(row, jax.random.key(0), SpecialIds())
    jax.eval_shape(lambda key: masked(row, key, SpecialIds(), random=0.0), jax.random.key(0))


@pytest.mark.parametrize("name", ["masked", "variable_length_masked"])
def test_masked_tokens_have_weight_and_denominator_1(name):
    example = rewritten(name, rows_of(20, 9, 30))
    assert set(np.unique(example.weights_L)) == {0.0, 1.0}
    np.testing.assert_array_equal(example.weights_L, example.loss_denominator_L)
    np.testing.assert_array_equal(
        example.targets_L, [packed([20, 9, 30, 1], LENGTH, seed)[0][1:] for seed in range(ROWS)]
    )


def test_the_masked_fraction_of_rows_is_uniform_in_its_range():
    """In every batch, by stratification: row b masks low + (high - low) * (b + U) / B of its tokens."""
    for options, low, high in (({}, 0.05, 0.95), ({"low": 0.2, "high": 0.3}, 0.2, 0.3)):
        example = rewritten("variable_length_masked", rows_of(100), **options)
        hidden_BxL = example.inputs_L == SPECIAL.mask
        np.testing.assert_array_equal(hidden_BxL[:, 1:], example.weights_L[:, :-1] > 0)
        share_B = low + (high - low) * (np.arange(ROWS) + 0.5) / ROWS
        assert np.abs(example.weights_L.sum(1) - share_B * LENGTH).max() <= 1 + LENGTH / ROWS
        assert example.weights_L.mean() == pytest.approx((low + high) / 2, abs=0.005)


@pytest.mark.parametrize(("low", "high"), [(0.15, 0.15), (0.0, 0.5), (0.0, 0.0)])
def test_masked_input_causal_masks_a_fraction_of_the_text_and_no_target(low, high):
    rows = rows_of(20, 9, 30)
    example = rewritten("masked_input_causal", rows, low=low, high=high)
    plain = rewritten("causal", rows)
    hidden_BxL = example.inputs_L != plain.inputs_L
    assert (example.inputs_L[hidden_BxL] == SPECIAL.mask).all()
    assert (plain.inputs_L[hidden_BxL] >= 16).all()
    for field in ("targets_L", "weights_L", "loss_denominator_L", "key_start_L", "key_end_L"):
        np.testing.assert_array_equal(getattr(example, field), getattr(plain, field))
    text_B = (plain.inputs_L >= 16).sum(1)
    share_B = low + (high - low) * (np.arange(ROWS) + 0.5) / ROWS
    assert np.abs(hidden_BxL.sum(1) - share_B * text_B).max() <= 1 + 0.1
    assert hidden_BxL.sum() / text_B.sum() == pytest.approx((low + high) / 2, abs=0.005)


def test_every_position_is_masked_equally_often():
    example = rewritten("masked_input_causal", rows_of(100), low=0.5, high=0.5)
    shares_L = (example.inputs_L == SPECIAL.mask).mean(0)
    assert shares_L[0] == 0  # <s>
    assert np.abs(shares_L[1:] - 0.5).max() < 4.5 * math.sqrt(0.25 / ROWS)
