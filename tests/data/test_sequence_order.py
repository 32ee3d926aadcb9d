"""The order of packed sequences under repetition."""

import collections
import itertools

import numpy as np
import pytest

from dualsm.data.document_lengths import GROUP_SIZE, DocumentLengths
from dualsm.data.sequence_order import WINDOW_GROUPS, SequenceOrder
from dualsm.process.errors import UserError

LENGTHS = np.random.default_rng(0).integers(1, 60, 100).astype(np.int32)
SEQ_LEN = 10
ONE_WINDOW = {"group_size": GROUP_SIZE, "window_groups": WINDOW_GROUPS}
WINDOWS = {"group_size": 3, "window_groups": 4}
each_shape = pytest.mark.parametrize("shape", [ONE_WINDOW, WINDOWS], ids=["one window", "windows"])


def make_order(lengths, *args, group_size=GROUP_SIZE, window_groups=WINDOW_GROUPS, **options):
    lengths = DocumentLengths.from_array(lengths, group_size)
    return SequenceOrder(lengths, *args, window_groups=window_groups, **options)


def order(budget=1600, repetitions=1, seed=3, lengths=LENGTHS, seq_len=SEQ_LEN, **options):
    return make_order(lengths, budget, seq_len, repetitions, seed, **options)


def tokens_of(order, indices, inputs_only=True) -> list[list[tuple[int, int, int]]]:
    """Returns the tokens of each sequence as (document, position in the document, document instance)."""
    found = [[] for _ in indices]
    for row, document, start, stop, instance in zip(*order.segments(np.array(indices)), strict=True):
        found[row] += [(int(document), t, int(instance)) for t in range(start, stop)]
    return [sequence[: order._seq_len] if inputs_only else sequence for sequence in found]


def inputs_of(order, indices=None) -> list[tuple[int, int]]:
    indices = range(order.num_sequences) if indices is None else indices
    return [(d, t) for sequence in tokens_of(order, indices) for d, t, _ in sequence]


def corpus_prefix(tokens: int, lengths=LENGTHS) -> set[tuple[int, int]]:
    """Returns the first tokens of the corpus."""
    flat = [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    return set(flat[:tokens])


@each_shape
@pytest.mark.parametrize("seq_len", [10, 16, 7, 500])
@pytest.mark.parametrize("repetitions", [1, 4, 8])
def test_each_unique_token_is_an_input_r_times(repetitions, seq_len, shape):
    budget = 1600
    tokens = inputs_of(order(budget, repetitions, seq_len=seq_len, **shape))
    counts = collections.Counter(tokens)
    assert set(counts.values()) == {repetitions}
    assert set(counts) == corpus_prefix(budget // repetitions)


@pytest.mark.parametrize("trial", range(60))
def test_random_corpora_are_repeated_exactly(trial):
    """Documents may be longer than sequences and windows, and passes shorter than sequences."""
    rng = np.random.default_rng(trial)
    longest = int(rng.choice([3, 30, 200]))
    lengths = rng.integers(1, longest + 1, rng.integers(1, 60)).astype(np.int32)
    unique, seq_len = int(rng.integers(1, lengths.sum() + 1)), int(rng.choice([1, 4, 16, 64]))
    budget = int(unique * rng.choice([1, 2, 2.5, 3])) or 1
    shape = {"group_size": int(rng.integers(1, 9)), "window_groups": int(rng.integers(1, 5))}
    seed = None if trial % 6 == 0 else trial
    shuffled = make_order(lengths, budget, seq_len, seed=seed, unique=unique, **shape)
    sequences = tokens_of(shuffled, range(shuffled.num_sequences), inputs_only=False)

    counts = collections.Counter(token[:2] for sequence in sequences for token in sequence[:seq_len])
    assert sum(counts.values()) == budget
    assert counts.keys() <= corpus_prefix(unique, lengths)
    partial = budget % unique > 0
    assert set(counts.values()) <= {budget // unique, budget // unique + partial}
    assert len(counts) == min(unique, budget)

    # The sequences, each with the first input of the next one, are the stream; an instance is one document.
    instances = collections.defaultdict(list)
    for document, t, instance in (token for sequence in sequences for token in sequence[:seq_len]):
        instances[instance].append((document, t))
    documents = 1 + max(document for document, _ in corpus_prefix(unique, lengths))
    for instance, tokens in instances.items():
        assert len({document for document, _ in tokens}) == 1
        assert len(set(tokens)) == len(tokens)
        assert instance // documents < -(-budget // unique)
    starts = collections.Counter(sequence[0] for sequence in sequences)
    for sequence in sequences:
        assert len(sequence) <= seq_len or starts[sequence[-1]]
        for (document, t, instance), (following, u, other) in itertools.pairwise(sequence):
            continues = (following, u, other) == (document, t + 1, instance)
            assert continues or (u == 0 and other == instance + 1)


@each_shape
def test_any_sequences_equal_those_of_an_iteration_from_the_start(shape):
    """Also in a new process, and together with any other sequences."""
    third = order(1600, 3, seed=1, **shape)
    expected = tokens_of(third, range(third.num_sequences), inputs_only=False)
    rng = np.random.default_rng(0)
    for trial in range(50):
        if trial % 10 == 0:
            third = order(1600, 3, seed=1, **shape)
        indices = rng.choice(third.num_sequences, rng.integers(1, 20))
        assert tokens_of(third, indices, inputs_only=False) == [expected[index] for index in indices]


@each_shape
def test_each_repetition_visits_all_tokens_before_the_next_starts(shape):
    four = order(repetitions=4, **shape)  # 40 sequences per repetition
    for repetition in range(4):
        seen = inputs_of(four, range(40 * repetition, 40 * (repetition + 1)))
        assert sorted(seen) == sorted(corpus_prefix(400))


@each_shape
def test_repetitions_differ_in_the_order_of_documents_and_sequences(shape):
    four = order(repetitions=4, **shape)
    passes = [inputs_of(four, range(40 * p, 40 * (p + 1))) for p in range(4)]
    assert len({tuple(p) for p in passes}) == 4
    neighbors = [set(zip(p, p[1:], strict=False)) for p in passes]  # segment borders differ too
    assert len({frozenset(n) for n in neighbors}) == 4


@each_shape
def test_the_data_of_eight_repetitions_is_the_first_half_of_the_data_of_four(shape):
    four, eight = (set(inputs_of(order(repetitions=r, seed=0, **shape))) for r in (4, 8))
    assert eight == corpus_prefix(200) < four == corpus_prefix(400)


@each_shape
def test_the_last_target_of_a_sequence_is_the_first_input_of_the_next(shape):
    plain = make_order(LENGTHS, 1600, SEQ_LEN, **shape)  # in the order of the corpus
    sequences = tokens_of(plain, range(plain.num_sequences), inputs_only=False)
    flat = [token[:2] for sequence in sequences for token in sequence[:SEQ_LEN]]
    assert flat == [(d, t) for d, length in enumerate(LENGTHS) for t in range(length)][:1600]
    sizes = [len(sequence) for sequence in sequences]
    assert sizes == [SEQ_LEN + 1] * (plain.num_sequences - 1) + [SEQ_LEN]
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(sequences))
    shuffled = tokens_of(order(**shape), range(160), inputs_only=False)
    starts = {sequence[0] for sequence in shuffled}
    assert all(sequence[-1] in starts for sequence in shuffled if len(sequence) > SEQ_LEN)


@each_shape
def test_a_new_document_within_a_sequence_starts_at_its_first_token(shape):
    for sequence in tokens_of(order(repetitions=4, **shape), range(160), inputs_only=False):
        for (document, t, instance), (next_document, u, next_instance) in itertools.pairwise(sequence):
            same = instance == next_instance
            assert (u == t + 1 and document == next_document) if same else u == 0


def test_a_long_document_does_not_fill_consecutive_sequences():
    shuffled = make_order([2000, *[20] * 100], 4000, SEQ_LEN, 1, seed=0)
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
    expected = [
        (ONE_WINDOW, [3, 4, 0, 1, 7, 2, 6, 5, 1, 3, 2, 4, 6, 0, 5, 7]),
        ({"group_size": 2, "window_groups": 2}, [1, 2, 0, 3, 4, 5, 6, 7, 5, 7, 6, 4, 3, 2, 1, 0]),
    ]
    for shape, documents in expected:
        segments = order(160, 2, seed=5, lengths=[10] * 8, **shape).segments(np.arange(16))
        inputs = segments.document_S[segments.stop_S - segments.start_S == 10]
        assert inputs.tolist() == documents


@pytest.mark.parametrize("shuffled", ["documents", "sequences"])
def test_shuffles_are_uniform(shuffled):
    """Every document and every sequence takes every position equally often."""
    n, trials = 6, 1500
    counts = np.zeros((n, n))
    for seed in range(trials):
        if shuffled == "documents":
            found = make_order([5] * n, 30, 30, 1, seed).segments(np.arange(1)).document_S
        else:
            found = make_order([30], 30, 5, 1, seed).segments(np.arange(n)).start_S // 5
        counts[found, np.arange(n)] += 1
    assert np.abs(counts / trials - 1 / n).max() < 0.04


def positions(documents: int, group_size: int, window_groups: int, seeds: int) -> np.ndarray:
    """Returns the position of each document in two passes per seed, [2 * seeds, documents]."""
    found = []
    for seed in range(seeds):
        shape = {"group_size": group_size, "window_groups": window_groups}
        # A sequence holds a pass, so that its documents are in the order of the pass.
        shuffled = make_order([1] * documents, 2 * documents, documents, 2, seed, **shape)
        for sequence in tokens_of(shuffled, range(2)):
            found.append(np.argsort([document for document, _, _ in sequence]))
    return np.array(found)


def test_documents_of_a_group_are_in_one_window_and_others_as_near_as_by_chance():
    """Two documents of a group are at most a window apart in each pass: on average a third of it."""
    documents, group_size, window_groups = 96, 4, 6  # four windows of 24 documents
    window = group_size * window_groups
    position_PxN = positions(documents, group_size, window_groups, 150)
    pairs = []  # positions of two documents of one group, and of two documents of different groups
    for shift in (1, 2 * group_size):
        pairs.append((position_PxN[:, ::group_size], np.roll(position_PxN, -shift, 1)[:, ::group_size]))
    near, far = (np.abs(a - b).mean() for a, b in pairs)
    near_in_window, far_in_window = ((a // window == b // window).mean() for a, b in pairs)
    assert near_in_window == 1
    groups = documents // group_size
    assert far_in_window == pytest.approx((window_groups - 1) / (groups - 1), abs=0.02)
    assert near == pytest.approx((window + 1) / 3, rel=0.03)
    assert far == pytest.approx(_mean_distance_of_groups(groups, window_groups, window), rel=0.03)
    # Each document takes each position equally often.
    counts = np.array([np.bincount(position_N // 8, minlength=12) for position_N in position_PxN.T])
    assert np.abs(counts / len(position_PxN) - 1 / 12).max() < 0.08


def _mean_distance_of_groups(groups: int, window_groups: int, window: int) -> float:
    """Returns the mean distance of two documents of different groups.

    They are in one window with probability p, a third of a window apart. Two positions in different windows
    are as far apart as the starts of their windows, on average.
    """
    p, windows = (window_groups - 1) / (groups - 1), groups // window_groups
    return p * (window + 1) / 3 + (1 - p) * window * (windows + 1) / 3


def test_few_documents_are_shuffled_as_a_whole():
    """In one window, neighbors in the corpus are as far apart as other documents."""
    position_PxN = positions(24, 4, 6, 300)
    for shift in (1, 12):
        distance = np.abs(position_PxN - np.roll(position_PxN, shift, 1))[:, shift:]
        assert distance.mean() == pytest.approx(25 / 3, rel=0.03)


@each_shape
def test_the_order_of_a_pass_tells_nothing_about_the_next(shape):
    position_PxN = positions(24, **shape, seeds=300)
    first, second = position_PxN[::2].ravel(), position_PxN[1::2].ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04


def test_windows_have_equal_numbers_of_groups():
    """A last window of a few documents would visit the sequences of a long document in succession."""
    shuffled = make_order([5] * 131, 655, 5, seed=0, group_size=2, window_groups=65)
    assert [len(groups) for groups in shuffled._pass(0).groups] == [33, 33]


def test_only_windows_in_use_are_read():
    """The number of documents that are read, and kept in memory, does not depend on the corpus."""
    lengths, read = DocumentLengths.from_array([7] * 10_000, group_size=10), []
    read_groups = lengths._read_groups
    lengths._read_groups = lambda group_K: read.extend(group_K) or read_groups(group_K)
    shuffled = SequenceOrder(lengths, 140_000, 7, 2, seed=0, window_groups=8)
    shuffled.segments(np.array([10_003]))
    assert len(read) <= 1 + 2 * 8  # the last group of the pass, and two windows
    read.clear()
    for first in range(0, 10_000, 10):
        shuffled.segments(np.arange(first, first + 10))
    assert len(read) == 1000 + 8  # a pass and the first window of the next
    assert shuffled._window.cache_info().currsize <= 3


def test_a_corpus_that_is_too_small_raises_with_both_sizes():
    with pytest.raises(UserError, match=rf"{LENGTHS.sum():,} training tokens.*needs 10,000 unique"):
        order(20_000, 2)


def test_a_corpus_with_fewer_tokens_than_a_sequence_raises_with_advice_that_works():
    """Repetitions are at most the number of sequences, so that more repetitions would not help."""
    lengths = np.array([60, 40], np.int32)
    with pytest.raises(
        UserError,
        match="the corpus has 100 training tokens, but a sequence has config.seq_len=256; lower "
        "config.seq_len to 100 or less, or prepare more text",
    ):
        order(40 * 256, lengths=lengths, seq_len=256)
    with pytest.raises(UserError, match="raise config.repetitions to 40 or more"):
        order(40 * 100, lengths=lengths, seq_len=100)
    assert order(40 * 100, 40, lengths=lengths, seq_len=100).unique == 100
