"""Training batches as a function of the step."""

import threading

import numpy as np
import pytest

from dualsm.data.batches import PAD_DOCUMENT, BatchSource, OrderedDocuments, read_batches, read_sequences
from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.data.document_lengths import RECORD_TOKENS, DocumentLengths
from dualsm.data.sequence_order import SequenceOrder

STEPS, BATCH_SIZE, SEQ_LEN = 20, 8, 32


@pytest.fixture(scope="module")
def source(corpus):
    return make_source(corpus, range(BATCH_SIZE))


def make_source(corpus, local_rows, seed=0):
    documents = corpus.documents("train")
    order = SequenceOrder(documents.lengths, STEPS * BATCH_SIZE * SEQ_LEN, SEQ_LEN, 4, seed)
    return BatchSource([OrderedDocuments(documents, order)], BATCH_SIZE, SEQ_LEN, 0, local_rows)


class InMemoryDocuments:
    """Implements the interface of `Documents` on lists, so that expected tokens can be spelled out."""

    def __init__(self, *documents):
        self._documents = [np.array(d) for d in documents]
        self.lengths = DocumentLengths.from_array([len(d) for d in documents])

    def read(self, document_S, start_S, stop_S):
        ranges = zip(document_S, start_S, stop_S, strict=True)
        return [self._documents[d][start:stop] for d, start, stop in ranges]


def test_packing_returns_tokens_and_document_indices():
    documents = InMemoryDocuments([2, 21, 22], [2, 23], [2, 24, 25, 26])
    order = SequenceOrder(documents.lengths, 9, 4)
    tokens_BxL1, documents_BxL1 = read_sequences(documents, order, np.array([2, 0, 1]), 4, pad=0)
    assert tokens_BxL1.tolist() == [[26, 0, 0, 0, 0], [2, 21, 22, 2, 23], [23, 2, 24, 25, 26]]
    pad = PAD_DOCUMENT
    assert documents_BxL1.tolist() == [[0, pad, pad, pad, pad], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]


def test_ranges_of_long_documents_are_read(tmp_path):
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
        (tokens,) = split.read([long], [start], [stop])
        np.testing.assert_array_equal(tokens, whole[start:stop])


def test_each_unique_token_is_an_input_once_per_repetition(source, corpus):
    inputs = np.concatenate([source[step]["tokens"][:, :-1].ravel() for step in range(STEPS)])
    documents = corpus.documents("train")
    unique = np.concatenate(documents.read(range(len(documents))))[: len(inputs) // 4]
    np.testing.assert_array_equal(np.bincount(inputs, minlength=512), 4 * np.bincount(unique, minlength=512))


def test_bos_is_at_document_starts_only(source):
    for step in (0, 7, STEPS - 1):
        element = source[step]
        begins = element["documents"][:, 1:] != element["documents"][:, :-1]
        text = element["documents"][:, 1:] != PAD_DOCUMENT
        np.testing.assert_array_equal(begins & text, (element["tokens"][:, 1:] == 2) & text)


def test_a_run_has_one_padding_position(source):
    padding = sum((source[step]["documents"] == PAD_DOCUMENT).sum() for step in range(STEPS))
    assert padding == 1  # the target after the last token


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_disjoint_rows_of_the_same_batch(source, corpus, processes):
    size = BATCH_SIZE // processes
    sources = [make_source(corpus, range(p * size, (p + 1) * size)) for p in range(processes)]
    for step in (0, 5, STEPS - 1):
        for name in ("tokens", "documents"):
            joined = np.concatenate([local[step][name] for local in sources])
            np.testing.assert_array_equal(joined, source[step][name])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_reading_can_start_at_any_step(source, num_threads):
    for first in (0, 13):
        steps = list(read_batches(source, first, num_threads, prefetch_steps=4))
        assert [element["step"] for element in steps] == list(range(first, STEPS))
        for element in steps:
            np.testing.assert_array_equal(element["tokens"], source[element["step"]]["tokens"])


def test_all_threads_read_if_there_are_more_threads_than_prefetched_steps(source):
    """Each thread waits for the others, so that an idle thread raises a timeout."""
    barrier = threading.Barrier(4, timeout=60)

    def transform(element: dict) -> int:
        if element["step"] < 4:
            barrier.wait()
        return element["step"]

    steps = read_batches(source, 0, num_threads=4, prefetch_steps=1, transform=transform)
    assert list(steps) == list(range(STEPS))


def test_different_seeds_give_different_batches(corpus, source):
    other = make_source(corpus, range(BATCH_SIZE), seed=1)
    assert np.mean([other[s]["tokens"] != source[s]["tokens"] for s in range(STEPS)]) > 0.5
