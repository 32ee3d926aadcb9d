"""The order of packed sequences under repetition."""

import itertools

import numpy as np
import pytest

from dualsm.data.sequence_order import SequenceOrder
from dualsm.process.errors import UserError

LENGTHS = np.random.default_rng(0).integers(1, 60, 100).astype(np.int32)
SEQ_LEN = 10


def order(budget=1600, repetitions=1, seed=3, lengths=LENGTHS, seq_len=SEQ_LEN):
    return SequenceOrder(lengths, budget, seq_len, repetitions, seed)


def tokens_of(order, indices, inputs_only=True) -> list[list[tuple[int, int, int]]]:
    """Returns the tokens of each sequence as (document, position in the document, document instance)."""
    found = [[] for _ in indices]
    for row, document, start, stop, instance in zip(*order.segments(np.array(indices)), strict=True):
        found[row] += [(int(document), t, int(instance)) for t in range(start, stop)]
    return [sequence[: order._seq_len] if inputs_only else sequence for sequence in found]


def inputs_of(order, indices=None) -> list[tuple[int, int]]:
    indices = range(order.num_sequences) if indices is None else indices
    return [(d, t) for sequence in tokens_of(order, indices) for d, t, _ in sequence]


def corpus_prefix(tokens: int) -> set[tuple[int, int]]:
    """Returns the first tokens of the corpus."""
    flat = [(d, t) for d, length in enumerate(LENGTHS) for t in range(length)]
    return set(flat[:tokens])


@pytest.mark.parametrize("seq_len", [10, 16, 7, 500])
@pytest.mark.parametrize("repetitions", [1, 4, 8])
def test_each_unique_token_is_an_input_r_times(repetitions, seq_len):
    budget = 1600
    tokens = inputs_of(order(budget, repetitions, seq_len=seq_len))
    counts = {token: tokens.count(token) for token in set(tokens)}
    assert set(counts.values()) == {repetitions}
    assert set(counts) == corpus_prefix(budget // repetitions)


def test_each_repetition_visits_all_tokens_before_the_next_starts():
    four = order(repetitions=4)  # 40 sequences per repetition
    for repetition in range(4):
        seen = inputs_of(four, range(40 * repetition, 40 * (repetition + 1)))
        assert sorted(seen) == sorted(corpus_prefix(400))


def test_repetitions_differ_in_the_order_of_documents_and_sequences():
    four = order(repetitions=4)
    passes = [inputs_of(four, range(40 * p, 40 * (p + 1))) for p in range(4)]
    assert len({tuple(p) for p in passes}) == 4
    neighbors = [set(zip(p, p[1:], strict=False)) for p in passes]  # segment borders differ too
    assert len({frozenset(n) for n in neighbors}) == 4


def test_the_data_of_eight_repetitions_is_the_first_half_of_the_data_of_four():
    four, eight = (set(inputs_of(order(repetitions=r, seed=0))) for r in (4, 8))
    assert eight == corpus_prefix(200) < four == corpus_prefix(400)


def test_the_last_target_of_a_sequence_is_the_first_input_of_the_next():
    plain = SequenceOrder(LENGTHS, 1600, SEQ_LEN)  # in the order of the corpus
    sequences = tokens_of(plain, range(plain.num_sequences), inputs_only=False)
    sizes = [len(sequence) for sequence in sequences]
    assert sizes == [SEQ_LEN + 1] * (plain.num_sequences - 1) + [SEQ_LEN]
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(sequences))
    shuffled = tokens_of(order(), range(160), inputs_only=False)
    starts = {sequence[0] for sequence in shuffled}
    assert all(sequence[-1] in starts for sequence in shuffled if len(sequence) > SEQ_LEN)


def test_a_new_document_within_a_sequence_starts_at_its_first_token():
    for sequence in tokens_of(order(repetitions=4), range(160), inputs_only=False):
        for (document, t, instance), (next_document, u, next_instance) in itertools.pairwise(sequence):
            same = instance == next_instance
            assert (u == t + 1 and document == next_document) if same else u == 0


def test_sequences_do_not_depend_on_the_other_sequences_of_the_call():
    third = order(1600, 3, seed=1)
    expected = tokens_of(third, range(third.num_sequences))
    rng = np.random.default_rng(0)
    for _ in range(50):
        indices = rng.choice(third.num_sequences, rng.integers(1, 20))
        assert tokens_of(third, indices) == [expected[index] for index in indices]


def test_a_long_document_does_not_fill_consecutive_sequences():
    lengths = np.array([2000, *[20] * 100])
    shuffled = SequenceOrder(lengths, 4000, SEQ_LEN, 1, seed=0)
    segments = shuffled.segments(np.arange(shuffled.num_sequences))
    long = np.bincount(segments.row_S, weights=segments.document_S == 0, minlength=400) > 0
    assert 180 < long.sum() < 220
    runs = np.diff(np.flatnonzero(np.diff(long.astype(int)) != 0))
    assert runs.max() < 20


def test_the_last_repetition_ends_early_if_the_repetitions_do_not_divide_the_budget():
    tokens = inputs_of(order(1000, 3))
    counts = {token: tokens.count(token) for token in set(tokens)}
    assert set(counts) == corpus_prefix(334)
    assert sorted(counts.values()) == [2, 2] + [3] * 332


def test_different_seeds_give_different_orders():
    assert len({tuple(inputs_of(order(400, seed=seed))) for seed in range(5)}) == 5


def test_the_order_does_not_depend_on_the_version_of_numpy():
    """A run that resumes with another version of NumPy must continue in the same order."""
    segments = order(160, 2, seed=5, lengths=np.full(8, 10)).segments(np.arange(16))
    inputs = segments.document_S[segments.stop_S - segments.start_S == 10]
    assert inputs.tolist() == [2, 3, 4, 7, 5, 6, 1, 0, 4, 2, 6, 3, 0, 5, 1, 7]


@pytest.mark.parametrize("shuffled", ["documents", "sequences"])
def test_shuffles_are_uniform(shuffled):
    """Every document and every sequence takes every position equally often."""
    n, trials = 6, 3000
    counts = np.zeros((n, n))
    for seed in range(trials):
        lengths = np.full(n, 5)
        if shuffled == "documents":
            order = SequenceOrder(lengths, 30, 30, 1, seed).segments(np.arange(1)).document_S
        else:
            order = SequenceOrder(np.array([30]), 30, 5, 1, seed).segments(np.arange(n)).start_S // 5
        counts[order, np.arange(n)] += 1
    assert np.abs(counts / trials - 1 / n).max() < 0.04


def test_a_corpus_that_is_too_small_raises_with_both_sizes():
    with pytest.raises(UserError, match=rf"{LENGTHS.sum():,} training tokens.*needs 10,000 unique"):
        order(20_000, 2)
