"""Batches by step."""

import threading

import numpy as np
import pytest

from dualsm.data.build import Recipe, build
from dualsm.data.corpus import RECORD_TOKENS, Corpus
from dualsm.data.order import RowOrder
from dualsm.data.pipeline import PAD_DOCUMENT, StepRows, read_rows, read_steps

STEPS, ROWS, TOKENS = 20, 8, 32


@pytest.fixture(scope="module")
def source(corpus):
    return make_source(corpus, range(ROWS))


def make_source(corpus, part, seed=0):
    documents = corpus.documents("train")
    order = RowOrder(documents.lengths_N, STEPS * ROWS * TOKENS, TOKENS, 4, seed)
    return StepRows(documents, order, ROWS, TOKENS, 0, part)


class Pieces:
    """Documents in memory."""

    def __init__(self, *documents):
        self._documents = [np.array(d) for d in documents]
        self.lengths_N = np.array([len(d) for d in documents])

    def read(self, document_S, start_S, stop_S):
        parts = zip(document_S, start_S, stop_S, strict=True)
        return [self._documents[d][a:b] for d, a, b in parts]


def test_packing_keeps_tokens_and_their_documents():
    documents = Pieces([2, 21, 22], [2, 23], [2, 24, 25, 26])
    order = RowOrder(documents.lengths_N, 9, 4)
    tokens_BxL1, documents_BxL1 = read_rows(documents, order, np.array([2, 0, 1]), 4, pad=0)
    assert tokens_BxL1.tolist() == [[26, 0, 0, 0, 0], [2, 21, 22, 2, 23], [23, 2, 24, 25, 26]]
    none = PAD_DOCUMENT
    assert documents_BxL1.tolist() == [[0, none, none, none, none], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]


def test_parts_of_long_documents_are_read_from_their_records(tmp_path):
    rng = np.random.default_rng(0)
    text = " ".join(map(str, rng.integers(0, 10**6, 6000).tolist()))
    (tmp_path / "long.txt").write_text(text)
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"{number} is a short document")
    recipe = Recipe(str(tmp_path / "*.txt"), vocab_size=384, valid_fraction=0.1)
    build(recipe, str(tmp_path / "corpus"), workers=1, quiet=True)
    corpus = Corpus(str(tmp_path / "corpus"))
    split = max((corpus.documents(name) for name in ("train", "valid")), key=lambda s: s.lengths_N.max())
    long = int(split.lengths_N.argmax())
    (whole,) = split.read([long])
    assert len(whole) == split.lengths_N[long] > 5 * RECORD_TOKENS
    assert corpus.tokenizer().decode(whole) == text
    for start, stop in [
        (0, 1),
        (5, RECORD_TOKENS),
        (RECORD_TOKENS, RECORD_TOKENS + 1),
        (2047, 2049),
        (100, 9000),
    ]:
        (part,) = split.read([long], [start], [stop])
        np.testing.assert_array_equal(part, whole[start:stop])


def test_each_token_of_the_run_is_an_input_once(source, corpus):
    inputs = np.concatenate([source[step]["tokens"][:, :-1].ravel() for step in range(STEPS)])
    documents = corpus.documents("train")
    unique = np.concatenate(documents.read(range(len(documents))))[: len(inputs) // 4]
    np.testing.assert_array_equal(np.bincount(inputs, minlength=512), 4 * np.bincount(unique, minlength=512))


def test_documents_begin_with_their_mark_and_nowhere_else(source):
    for step in (0, 7, STEPS - 1):
        element = source[step]
        begins = element["documents"][:, 1:] != element["documents"][:, :-1]
        text = element["documents"][:, 1:] != PAD_DOCUMENT
        np.testing.assert_array_equal(begins & text, (element["tokens"][:, 1:] == 2) & text)


def test_only_one_position_of_the_run_is_filled(source):
    filled = sum((source[step]["documents"] == PAD_DOCUMENT).sum() for step in range(STEPS))
    assert filled == 1  # the target after the last token


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


def test_all_threads_read(source):
    """Also where `ahead` asks for fewer steps than there are threads: each waits for the others here."""
    together = threading.Barrier(4, timeout=60)

    def finish(step: dict) -> int:
        if step["step"] < 4:
            together.wait()
        return step["step"]

    assert list(read_steps(source, 0, threads=4, ahead=1, finish=finish)) == list(range(STEPS))


def test_seeds_give_other_orders(corpus, source):
    other = make_source(corpus, range(ROWS), seed=1)
    assert np.mean([other[s]["tokens"] != source[s]["tokens"] for s in range(STEPS)]) > 0.5
