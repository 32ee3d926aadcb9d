"""Span denoising: only the end of a document is cut, spans match the denoiser, only spans have loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.objectives.span_denoising import DENOISERS, EXTREME, HOLE, REGULAR, SEQUENTIAL, draw_spans

from .conftest import SPECIAL, batch, packed, rewritten

ROWS, LENGTH = 84, 96
MODES = {REGULAR: "R", SEQUENTIAL: "S", EXTREME: "X"}
# Rows of a batch by mode: the draw is stratified over two R, one S and four X denoisers.
BY_MODE = {"R": range(24), "S": range(24, 36), "X": range(36, 84)}
LENGTHS = [30, 1, 2, 25, 3, 20, 16]  # the last one continues in the next row


@pytest.fixture(scope="module")
def layouts() -> list:
    return [packed(LENGTHS, LENGTH, seed) for seed in range(ROWS)]


@pytest.fixture(scope="module")
def example(layouts):
    return rewritten("span_denoising", batch(layouts))


def form(example, b: int) -> np.ndarray:
    """Returns the inputs of row b and its last target, [L + 1]."""
    return np.append(example.inputs_L[b], example.targets_L[b, -1])


def documents_of(documents_L1: np.ndarray):
    """Yields the start and the exclusive end of each document."""
    for document in np.unique(documents_L1[documents_L1 >= 0]):
        places = np.flatnonzero(documents_L1 == document)
        yield places[0], places[-1] + 1


def take_apart(form: np.ndarray, bar: int) -> tuple[list[int], list[list[int]], list[int]]:
    """Returns the prefix, the spans and the restored text of a corrupted document without its mode token."""
    prefix, behind = form[: bar - 1].tolist(), form[bar - 1 :].tolist()
    while behind and behind[-1] == SPECIAL.pad:
        behind.pop()
    assert SPECIAL.pad not in prefix + behind
    spans = []
    for token in behind:
        if token == HOLE:
            spans.append([])
        else:
            spans[-1].append(token)
    waiting, text = iter(spans), []
    for token in prefix:
        text += next(waiting) if token == HOLE else [token]
    assert next(waiting, None) is None, "more spans than holes"
    return prefix, spans, text


@pytest.mark.parametrize("mode", ["R", "X"])
def test_the_spans_inserted_into_the_prefix_restore_the_document(mode, layouts, example):
    """Except for the end that is cut, which is not longer than the sentinels."""
    cut = 0
    for b in BY_MODE[mode]:
        tokens_L1, documents_L1 = layouts[b]
        form_L1 = form(example, b)
        for start, end in documents_of(documents_L1):
            assert MODES[int(form_L1[start])] == mode
            bar = min(int(example.key_end_L[b, start]), end) - start
            _, spans, text = take_apart(form_L1[start + 1 : end], bar)
            assert text == tokens_L1[start + 1 : start + 1 + len(text)].tolist()
            lost = end - start - 1 - len(text)
            assert lost <= 2 * len(spans) + 2  # one more token and its sentinels would not fit
            assert all(spans), "a span without tokens"
            cut += lost
    assert cut > 0


def test_only_the_tokens_of_missing_spans_have_loss(layouts, example):
    np.testing.assert_array_equal(example.weights_L, example.loss_denominator_L)
    for b in [*BY_MODE["R"], *BY_MODE["X"]]:
        form_L1, scored_L1 = form(example, b), np.zeros(LENGTH + 1, bool)
        for start, end in documents_of(layouts[b][1]):
            bar = int(example.key_end_L[b, start])
            scored_L1[bar:end] = form_L1[bar:end] >= 16
            inner = slice(start, end - 1)  # targets are the inputs of the next position
            np.testing.assert_array_equal(example.targets_L[b, inner], form_L1[start + 1 : end])
        np.testing.assert_array_equal(example.weights_L[b], scored_L1[1:])
        assert scored_L1.any() or b in BY_MODE["R"]


def test_attention_is_bidirectional_before_the_bar_and_causal_after_it(layouts, example):
    for b in range(ROWS):
        for start, end in documents_of(layouts[b][1][:-1]):
            bar = int(example.key_end_L[b, start])
            assert (example.key_start_L[b, start:end] == start).all()
            np.testing.assert_array_equal(
                example.key_end_L[b, start:end], np.maximum(bar, np.arange(start, end) + 1)
            )


@pytest.fixture(scope="module")
def spans():
    """Returns `draw_spans`, compiled for many keys; documents, span and fraction are arguments."""
    return jax.jit(jax.vmap(draw_spans, in_axes=(0, None, None, None)))


@pytest.mark.parametrize("index", [0, 1, 3, 4, 5, 6])
def test_spans_have_the_fraction_and_the_mean_length_of_their_denoiser(index, spans):
    denoiser = DENOISERS[index]
    documents_L1 = jnp.asarray(np.repeat([0, 1], [601, 400]))
    keys_B = jax.random.split(jax.random.key(index), 400)
    missing_BxL1 = np.asarray(spans(keys_B, documents_L1, denoiser.span, denoiser.fraction))
    for start, n in ((0, 600), (601, 399)):
        part_BxL = missing_BxL1[:, start : start + n + 1]
        assert not part_BxL[:, 0].any()
        counts_B = part_BxL.sum(1)
        assert np.abs(counts_B - denoiser.fraction * n).max() < 1
        # Spans never touch, so each begins a run; their number is rounded and at least one.
        opens_B = (part_BxL[:, 1:] & ~part_BxL[:, :-1]).sum(1)
        wanted = max(1, denoiser.fraction * n / denoiser.span)
        assert np.abs(opens_B - wanted).max() <= 1.2
        assert opens_B.mean() == pytest.approx(wanted, abs=4 * 0.5 / np.sqrt(len(keys_B)))


def test_all_divisions_into_spans_are_equally_likely(spans):
    """Enumerates 3 of 5 tokens in 2 spans: 2 divisions times 3 choices of gaps."""
    keys_B = jax.random.split(jax.random.key(0), 6000)
    missing_BxL1 = np.asarray(spans(keys_B, jnp.zeros(6, jnp.int32), 1.5, 0.6))
    patterns, counts = np.unique(missing_BxL1[:, 1:], axis=0, return_counts=True)
    drawn = {tuple(np.flatnonzero(p)): c for p, c in zip(patterns, counts, strict=True)}
    assert set(drawn) == {(0, 2, 3), (0, 3, 4), (1, 3, 4), (0, 1, 3), (0, 1, 4), (1, 2, 4)}
    np.testing.assert_allclose(list(drawn.values()), 1000, atol=4 * np.sqrt(1000))


def test_rows_draw_all_denoisers_equally_often(example):
    """By stratification: of seven rows one is S, two are R and four are X, each with its number of holes."""
    for mode, rows in BY_MODE.items():
        assert {MODES[int(example.inputs_L[b, 0])] for b in rows} == {mode}
    holes = (example.inputs_L == HOLE).sum(1).reshape(7, 12).mean(1)
    assert holes[0] > holes[1] > 0
    assert holes[2] == 0
    assert holes[3] > holes[4] > holes[5] > 0


def test_the_sequential_denoiser_is_prefix_with_a_mode_token(layouts, example):
    prefixes = set()
    for b in BY_MODE["S"]:
        tokens_L1, documents_L1 = layouts[b]
        for start, end in documents_of(documents_L1[:-1]):
            assert example.inputs_L[b, start] == SEQUENTIAL
            inner = slice(start + 1, end)
            np.testing.assert_array_equal(example.inputs_L[b, inner], tokens_L1[inner])
            bar = int(example.key_end_L[b, start])
            same_L = documents_L1[start + 1 : end + 1] == documents_L1[start]
            scored_L = same_L & (np.arange(start, end) + 1 >= bar)
            np.testing.assert_array_equal(example.weights_L[b, start:end], scored_L)
            prefixes.add(bar - start)
        np.testing.assert_array_equal(example.targets_L[b], tokens_L1[1:])
    assert len(prefixes) > 20


def test_special_tokens_are_never_missing(layouts):
    marked = []
    for tokens_L1, documents_L1 in layouts:
        tokens_L1 = tokens_L1.copy()
        tokens_L1[[10, 20, 40]] = SPECIAL.eos
        marked.append((tokens_L1, documents_L1))
    example = rewritten("span_denoising", batch(marked))
    for b in [*BY_MODE["R"], *BY_MODE["X"]]:
        assert (example.targets_L[b][example.weights_L[b] > 0] >= 16).all()
        front = example.inputs_L[b, : example.key_end_L[b, 0]]
        assert (front == SPECIAL.eos).sum() >= 1  # the second may be in the end that is cut
