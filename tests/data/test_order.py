"""The order of tokens under repetition."""

import numpy as np
import pytest

from dualsm.data.order import RepeatedStream
from dualsm.errors import UserError

LENGTHS = np.random.default_rng(0).integers(1, 60, 100).astype(np.int32)


def walk(stream: RepeatedStream, start: int, stop: int) -> list[tuple[int, int]]:
    """Tokens of the stream as (document, position in the document)."""
    segments = stream.segments(start, stop)
    return [
        (int(d), t)
        for d, a, b in zip(segments.document_S, segments.start_S, segments.stop_S, strict=True)
        for t in range(a, b)
    ]


def corpus_prefix(tokens: int) -> set[tuple[int, int]]:
    """The first tokens of the corpus, in its own order."""
    flat = [(d, t) for d, length in enumerate(LENGTHS) for t in range(length)]
    return set(flat[:tokens])


@pytest.mark.parametrize("repetitions", [1, 4, 8])
def test_each_unique_token_comes_r_times(repetitions):
    budget = 1600
    tokens = walk(RepeatedStream(LENGTHS, budget, repetitions, seed=3), 0, budget)
    counts = {token: tokens.count(token) for token in set(tokens)}
    assert set(counts.values()) == {repetitions}
    assert set(counts) == corpus_prefix(budget // repetitions)


def test_passes_differ_in_order():
    stream = RepeatedStream(LENGTHS, 1600, 4, seed=3)
    passes = [tuple(walk(stream, 400 * p, 400 * (p + 1))) for p in range(4)]
    assert len(set(passes)) == 4
    assert len({frozenset(p) for p in passes}) == 1


def test_the_data_of_eight_repetitions_is_the_first_half_of_that_of_four():
    four, eight = (RepeatedStream(LENGTHS, 1600, r, seed=0) for r in (4, 8))
    assert set(walk(eight, 0, 1600)) == corpus_prefix(200) < set(walk(four, 0, 1600)) == corpus_prefix(400)


def test_documents_stay_whole_and_are_told_apart():
    stream = RepeatedStream(LENGTHS, 1600, 4, seed=3)
    segments = stream.segments(0, 1600)
    assert len(set(segments.occurrence_S)) == len(segments.occurrence_S)
    for document, start, stop in zip(segments.document_S, segments.start_S, segments.stop_S, strict=True):
        assert start == 0
        last = document == segments.document_S.max()  # the last document is cut to fit
        assert stop == LENGTHS[document] or (last and stop < LENGTHS[document])


def test_random_access_equals_a_walk():
    stream = RepeatedStream(LENGTHS, 1600, 3, seed=1)
    whole = walk(stream, 0, 1600)
    rng = np.random.default_rng(0)
    for _ in range(100):
        start, stop = sorted(rng.choice(1601, 2, replace=False))
        assert walk(stream, start, stop) == whole[start:stop]
    occurrences = stream.segments(0, 1600).occurrence_S
    assert (np.diff(occurrences) == 1).all()


def test_a_budget_that_repetitions_do_not_divide_ends_early_in_the_last_pass():
    tokens = walk(RepeatedStream(LENGTHS, 1000, 3, seed=1), 0, 1000)
    counts = {token: tokens.count(token) for token in set(tokens)}
    assert set(counts) == corpus_prefix(334)
    assert sorted(counts.values()) == [2, 2] + [3] * 332


def test_seeds_shuffle_differently():
    orders = {tuple(walk(RepeatedStream(LENGTHS, 400, 1, seed), 0, 400)) for seed in range(5)}
    assert len(orders) == 5


def test_the_order_is_the_same_for_ever():
    """Resuming with another version of NumPy must find the same order."""
    stream = RepeatedStream(np.full(8, 10), 160, 2, seed=5)
    assert stream.segments(0, 160).document_S.tolist() == [5, 6, 0, 3, 4, 1, 2, 7, 6, 3, 4, 7, 0, 1, 5, 2]


def test_a_shuffle_is_uniform():
    """Each document comes to each place equally often."""
    n, trials = 6, 3000
    places = np.zeros((n, n))
    for seed in range(trials):
        order = RepeatedStream(np.full(n, 5), 30, 1, seed).segments(0, 30).document_S
        places[order, np.arange(n)] += 1
    assert np.abs(places / trials - 1 / n).max() < 0.04


def test_too_small_a_corpus_names_both_numbers():
    with pytest.raises(UserError, match=rf"{LENGTHS.sum():,} training tokens.*needs 10,000 unique"):
        RepeatedStream(LENGTHS, 20_000, 2, seed=0)
