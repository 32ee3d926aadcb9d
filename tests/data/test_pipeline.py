"""Batches by step."""

import numpy as np
import pytest

from dualsm.data.order import RepeatedStream
from dualsm.data.pipeline import PAD_DOCUMENT, StepRows, pack, read_steps

STEPS, ROWS, TOKENS = 20, 8, 32


@pytest.fixture(scope="module")
def source(corpus):
    return make_source(corpus, range(ROWS))


def make_source(corpus, rows, seed=0):
    documents = corpus.documents("train")
    stream = RepeatedStream(documents.lengths_N, STEPS * ROWS * TOKENS, 4, seed)
    return StepRows(documents, stream, STEPS, ROWS, TOKENS, 0, rows)


def test_packing_keeps_tokens_and_their_owners():
    pieces = [np.array([2, 21, 22]), np.array([2, 23]), np.array([2, 24, 25, 26])]
    tokens_BxL1, documents_BxL1 = pack(pieces, np.array([5, 6, 7]), rows=3, row_tokens=4, pad=0)
    assert tokens_BxL1.tolist() == [[2, 21, 22, 2, 23], [23, 2, 24, 25, 26], [26, 0, 0, 0, 0]]
    none = PAD_DOCUMENT
    assert documents_BxL1.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, none, none, none, none]]


def test_each_token_of_the_run_is_an_input_once(source, corpus):
    inputs = np.concatenate([source[step]["tokens"][:, :-1].ravel() for step in range(STEPS)])
    documents = corpus.documents("train")
    unique = np.concatenate(documents.read(range(len(documents))))[: len(inputs) // 4]
    np.testing.assert_array_equal(np.bincount(inputs, minlength=512), 4 * np.bincount(unique, minlength=512))


def test_rows_overlap_by_one_token(source):
    rows = np.concatenate([source[step]["tokens"] for step in range(STEPS)])
    np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])


def test_documents_begin_with_their_mark_and_nowhere_else(source):
    for step in (0, 7, STEPS - 1):
        element = source[step]
        begins = element["documents"][:, 1:] != element["documents"][:, :-1]
        text = element["documents"][:, 1:] != PAD_DOCUMENT
        np.testing.assert_array_equal(begins & text, (element["tokens"][:, 1:] == 2) & text)


def test_only_the_last_position_of_the_run_is_filled(source):
    assert (source[STEPS - 1]["documents"] == PAD_DOCUMENT).sum() == 1
    assert source[STEPS - 1]["documents"][-1, -1] == PAD_DOCUMENT
    assert all((source[step]["documents"] != PAD_DOCUMENT).all() for step in range(STEPS - 1))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_rows_of_the_whole(source, corpus, processes):
    part = ROWS // processes
    shares = [make_source(corpus, range(p * part, (p + 1) * part)) for p in range(processes)]
    for step in (0, 5, STEPS - 1):
        for name in ("tokens", "documents"):
            together = np.concatenate([share[step][name] for share in shares])
            np.testing.assert_array_equal(together, source[step][name])


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_can_start_at_any_step(source, threads):
    for first in (0, 13):
        steps = list(read_steps(source, first, threads, ahead=4))
        assert [element["step"] for element in steps] == list(range(first, STEPS))
        for element in steps:
            np.testing.assert_array_equal(element["tokens"], source[element["step"]]["tokens"])


def test_seeds_give_other_orders(corpus, source):
    other = make_source(corpus, range(ROWS), seed=1)
    assert np.mean([other[s]["tokens"] != source[s]["tokens"] for s in range(STEPS)]) > 0.5
