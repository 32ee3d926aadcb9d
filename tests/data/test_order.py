"""The order of rows under repetition."""

import numpy as np
import pytest

from dualsm.data.order import RowOrder
from dualsm.process.errors import UserError

LENGTHS = np.random.default_rng(0).integers(1, 60, 100).astype(np.int32)
ROW = 10


def order(budget=1600, repetitions=1, seed=3, lengths=LENGTHS, seq_len=ROW):
    return RowOrder(lengths, budget, seq_len, repetitions, seed)


def tokens_of(order, rows, inputs_only=True) -> list[list[tuple[int, int, int]]]:
    """Each row's tokens as (document, position in the document, occurrence)."""
    found = [[] for _ in rows]
    for row, document, start, stop, occurrence in zip(*order.segments(np.array(rows)), strict=True):
        found[row] += [(int(document), t, int(occurrence)) for t in range(start, stop)]
    return [row[: order._seq_len] if inputs_only else row for row in found]


def inputs_of(order, rows=None) -> list[tuple[int, int]]:
    rows = range(order.rows) if rows is None else rows
    return [(d, t) for row in tokens_of(order, rows) for d, t, _ in row]


def corpus_prefix(tokens: int) -> set[tuple[int, int]]:
    """The first tokens of the corpus, in its own order."""
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


def test_each_pass_sees_all_its_tokens_before_the_next_begins():
    four = order(repetitions=4)  # 40 rows a pass
    for number in range(4):
        seen = inputs_of(four, range(40 * number, 40 * (number + 1)))
        assert sorted(seen) == sorted(corpus_prefix(400))


def test_passes_differ_in_the_order_of_documents_and_of_rows():
    four = order(repetitions=4)
    passes = [inputs_of(four, range(40 * p, 40 * (p + 1))) for p in range(4)]
    assert len({tuple(p) for p in passes}) == 4
    neighbours = [set(zip(p, p[1:], strict=False)) for p in passes]  # rows are cut elsewhere in each pass
    assert len({frozenset(n) for n in neighbours}) == 4


def test_the_data_of_eight_repetitions_is_the_first_half_of_that_of_four():
    four, eight = (set(inputs_of(order(repetitions=r, seed=0))) for r in (4, 8))
    assert eight == corpus_prefix(200) < four == corpus_prefix(400)


def test_rows_hold_one_token_more_than_their_inputs_which_begins_the_next():
    plain = RowOrder(LENGTHS, 1600, ROW)  # in the corpus's own order
    rows = tokens_of(plain, range(plain.rows), inputs_only=False)
    assert [len(row) for row in rows] == [ROW + 1] * (plain.rows - 1) + [ROW]
    assert all(a[-1] == b[0] for a, b in zip(rows, rows[1:], strict=False))
    shuffled = tokens_of(order(), range(160), inputs_only=False)
    begins = {row[0] for row in shuffled}
    assert all(row[-1] in begins for row in shuffled if len(row) > ROW)


def test_documents_within_a_row_are_told_apart_and_begin_at_their_beginning():
    for row in tokens_of(order(repetitions=4), range(160), inputs_only=False):
        for (d, t, o), (e, u, p) in zip(row, row[1:], strict=False):
            assert (u == t + 1 and d == e) if o == p else u == 0


def test_asking_for_any_rows_in_any_order_gives_the_same_rows():
    third = order(1600, 3, seed=1)
    whole = tokens_of(third, range(third.rows))
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = rng.choice(third.rows, rng.integers(1, 20))
        assert tokens_of(third, rows) == [whole[row] for row in rows]


def test_a_long_document_does_not_fill_consecutive_rows():
    lengths = np.array([2000, *[20] * 100])
    shuffled = RowOrder(lengths, 4000, ROW, 1, seed=0)
    segments = shuffled.segments(np.arange(shuffled.rows))
    long = np.bincount(segments.row_S, weights=segments.document_S == 0, minlength=400) > 0
    assert 180 < long.sum() < 220
    runs = np.diff(np.flatnonzero(np.diff(long.astype(int)) != 0))
    assert runs.max() < 20


def test_a_budget_that_repetitions_do_not_divide_ends_early_in_the_last_pass():
    tokens = inputs_of(order(1000, 3))
    counts = {token: tokens.count(token) for token in set(tokens)}
    assert set(counts) == corpus_prefix(334)
    assert sorted(counts.values()) == [2, 2] + [3] * 332


def test_seeds_shuffle_differently():
    assert len({tuple(inputs_of(order(400, seed=seed))) for seed in range(5)}) == 5


def test_the_order_is_the_same_for_ever():
    """Resuming with another version of NumPy must find the same order."""
    segments = order(160, 2, seed=5, lengths=np.full(8, 10)).segments(np.arange(16))
    inputs = segments.document_S[segments.stop_S - segments.start_S == 10]
    assert inputs.tolist() == [2, 3, 4, 7, 5, 6, 1, 0, 4, 2, 6, 3, 0, 5, 1, 7]


@pytest.mark.parametrize("what", ["documents", "rows"])
def test_shuffles_are_uniform(what):
    """Each document (in a row that holds all) and each row comes to each place equally often."""
    n, trials = 6, 3000
    places = np.zeros((n, n))
    for seed in range(trials):
        lengths = np.full(n, 5)
        if what == "documents":
            shuffled = RowOrder(lengths, 30, 30, 1, seed).segments(np.arange(1)).document_S
        else:
            shuffled = RowOrder(np.array([30]), 30, 5, 1, seed).segments(np.arange(n)).start_S // 5
        places[shuffled, np.arange(n)] += 1
    assert np.abs(places / trials - 1 / n).max() < 0.04


def test_too_small_a_corpus_names_both_numbers():
    with pytest.raises(UserError, match=rf"{LENGTHS.sum():,} training tokens.*needs 10,000 unique"):
        order(20_000, 2)
