"""Objectives with distant targets: distances, mode tokens, mean over the rest of a document."""

import numpy as np
import pytest

from dualsm.objectives.ahead import AHEAD_2, MAX_DISTANCE, REST

from .conftest import SPECIAL, batch, packed, rewritten

LENGTH = 24


def distance_of(inputs_L: np.ndarray) -> int:
    """Returns the distance that the mode token of a row encodes."""
    return 1 if inputs_L[0] == SPECIAL.bos else int(inputs_L[0]) - AHEAD_2 + 2


@pytest.mark.parametrize("farthest", [1, 4, MAX_DISTANCE])
def test_distances_are_drawn_equally_often(farthest):
    rows = 4 * farthest
    example = rewritten("diverse_causal", batch([packed([40], LENGTH)] * rows), distance=farthest)
    distances = [distance_of(inputs_L) for inputs_L in example.inputs_L]
    assert distances == [1 + b // 4 for b in range(rows)]  # stratified: exactly


def test_targets_are_at_the_distance_inside_the_document():
    lengths = [9, 1, 3, 8]
    tokens_L1, documents_L1 = packed([*lengths, 9], LENGTH)
    example = rewritten("diverse_causal", batch([(tokens_L1, documents_L1)] * 14), distance=7)
    seen = set()
    for b in range(14):
        d = distance_of(example.inputs_L[b])
        seen.add(d)
        for i in range(LENGTH):
            inside = i + d <= LENGTH and documents_L1[i + d] == documents_L1[i]
            assert example.weights_L[b, i] == example.loss_denominator_L[b, i] == inside
            if inside:
                assert example.targets_L[b, i] == tokens_L1[i + d]
    assert seen == set(range(1, 8))


def test_only_the_first_token_of_each_document_becomes_a_mode_token():
    tokens_L1, documents_L1 = packed([9, 1, 3, 6], LENGTH)  # followed by padding, which has no mode token
    first_L = np.isin(np.arange(LENGTH), [0, 9, 10, 13])
    for name, modes in (
        ("diverse_causal", {AHEAD_2, AHEAD_2 + 1, AHEAD_2 + 2, SPECIAL.bos}),
        ("next_all", {REST}),
    ):
        inputs_BxL = rewritten(name, batch([(tokens_L1, documents_L1)] * 14)).inputs_L
        assert set(inputs_BxL[:, first_L].ravel()) == modes
        assert (inputs_BxL[:, first_L] == inputs_BxL[:, :1]).all()
        assert (inputs_BxL[:, ~first_L] == tokens_L1[:-1][~first_L]).all()


def test_distance_one_is_causal_bit_for_bit():
    rows = batch([packed([5, 1, 9, 6], LENGTH, seed) for seed in range(8)])
    plain, first = rewritten("causal", rows), rewritten("diverse_causal", rows, distance=1)
    quarter = rewritten("diverse_causal", rows, distance=4)
    for field, value in plain._asdict().items():
        assert getattr(first, field).dtype == value.dtype
        np.testing.assert_array_equal(getattr(first, field), value)
        np.testing.assert_array_equal(getattr(quarter, field)[:2], value[:2])


def test_next_all_is_an_unbiased_estimate_over_the_rest_of_the_document():
    """At each position, the mean loss over draws is the mean over the rest, for a table of losses."""
    draws = 6000
    tokens_L1, documents_L1 = packed([9, 1, 4, 30], LENGTH)
    tokens_L1 = np.where(tokens_L1 < 16, tokens_L1, 16 + np.arange(LENGTH + 1))  # all tokens differ
    example = rewritten("next_all", batch([(tokens_L1, documents_L1)] * draws))
    loss = np.random.default_rng(0).normal(size=(LENGTH, 64))  # by position and token
    for i in range(LENGTH):
        rest = [j for j in range(i + 1, LENGTH + 1) if documents_L1[j] == documents_L1[i]]
        assert (example.weights_L[:, i] == bool(rest)).all()
        assert (example.loss_denominator_L[:, i] == bool(rest)).all()
        if rest:
            drawn = loss[i, example.targets_L[:, i]]
            exact = loss[i, tokens_L1[rest]]
            assert set(example.targets_L[:, i]) == set(tokens_L1[rest])
            assert abs(drawn.mean() - exact.mean()) <= 4 * exact.std() / np.sqrt(draws) + 1e-12
            assert drawn.std() == pytest.approx(exact.std(), rel=0.1, abs=1e-12)


def test_next_all_draws_independently_at_each_position():
    """Two positions agree as often as independent draws do."""
    example = rewritten("next_all", batch([packed([60], LENGTH)] * 4000))
    tokens_L1, _ = packed([60], LENGTH)
    same = (example.targets_L[:, 0] == example.targets_L[:, 1]).mean()
    values, counts = np.unique(tokens_L1[1:], return_counts=True)
    chances = dict(zip(values.tolist(), counts / counts.sum(), strict=True))
    rest, counts = np.unique(tokens_L1[2:], return_counts=True)
    independent = sum(chances[v] * c / counts.sum() for v, c in zip(rest.tolist(), counts, strict=True))
    assert same == pytest.approx(independent, abs=0.015)
