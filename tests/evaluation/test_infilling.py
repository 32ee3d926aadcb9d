"""Infilling of single words: choice of the words, predictions of models with known answers."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import freeze
from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.devices import sharding
from dualsm.evaluation.held_out_words import draw_words, find_words
from dualsm.evaluation.infilling import evaluate_infilling, predict_words
from dualsm.evaluation.results_table import results_table, results_warnings
from dualsm.generation.diffusion import UnmaskingParams, infill
from dualsm.generation.sampling_params import SamplingParams
from dualsm.model.transformer import bind, init_params
from dualsm.process.errors import UserError
from dualsm.rundir.results import merge
from dualsm.rundir.trained_run import TrainedRun
from tests.micro import micro_config

MASK = 4


def run_of(corpus, change=lambda params: params, devices=1):
    config = micro_config()
    config.model.vocab_size, config.seq_len, config.mesh.data = corpus.vocab_size, 32, devices
    params = change(jax.tree.map(lambda p: 4 * p, init_params(config.model, jax.random.key(1))))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    return TrainedRun(None, config, corpus.tokenizer(), 0, params, mesh)


@pytest.fixture(scope="module")
def words(corpus):
    return draw_words([corpus.documents("valid")], corpus.tokenizer(), 32, 48)


def texts_of(corpus, words):
    tokenizer = corpus.tokenizer()
    return [tokenizer.decode(word.tokens_L[word.start : word.stop], inside=True) for word in words]


def test_words_are_whole_words(corpus, words):
    tokenizer, several = corpus.tokenizer(), 0
    for word, text in zip(words, texts_of(corpus, words), strict=True):
        assert re.fullmatch(r"\s?[^\W\d_]+(['’-][^\W\d_]+)*", text), text
        assert len(text.strip().encode()) == word.bytes
        before = tokenizer.decode(word.tokens_L[: word.start], inside=True)
        after = tokenizer.decode(word.tokens_L[word.stop :], inside=True)
        assert text[0].isspace() or not before[-1:].isalpha()
        assert not after[:1].isalpha()
        several += word.stop - word.start > 1
    assert 0 < several < len(words)
    assert len({word.document for word in words}) > 20


def test_all_words_inside_a_sentence_are_found(corpus):
    tokenizer = corpus.tokenizer()
    (tokens,) = tokenizer.encode(["The parser's naïve-ish header reads lines, then returns 中文 7 tokens."])
    whole = np.array([2, *tokens, 3])

    def found(tokens_L):
        ranges = find_words(tokens_L, tokenizer, tokenizer.token_bytes())
        return [tokenizer.decode(tokens_L[i:j], inside=True).strip() for i, j, _ in ranges]

    all_words = [
        "The",
        "parser's",
        "naïve-ish",
        "header",
        "reads",
        "lines",
        "then",
        "returns",
        "中文",
        "tokens",
    ]
    assert set(found(whole)) <= set(all_words)
    assert set(found(whole)) >= {"parser's", "naïve-ish", "header", "reads", "returns", "中文"}
    for start in range(1, len(whole)):  # also cuts inside of words and characters
        for stop in range(start + 1, len(whole)):
            assert set(found(whole[start:stop])) <= set(found(whole))


def test_the_words_depend_only_on_the_text(corpus, words):
    again = draw_words([corpus.documents("valid")], corpus.tokenizer(), 32, 48)
    assert texts_of(corpus, again) == texts_of(corpus, words)
    few = draw_words([corpus.documents("valid")], corpus.tokenizer(), 32, 7)
    assert len(few) == 7 and len({word.document for word in few}) >= 5  # a segment may have no word


def test_a_constant_model_fills_in_the_word_that_it_knows(corpus, words):
    """With logits that do not depend on the text, accuracy and bits per byte are known."""
    single = [word.tokens_L[word.start] for word in words if word.stop == word.start + 1]
    known, count = max(((token, single.count(token)) for token in single), key=lambda pair: pair[1])
    bias_V = np.zeros(corpus.vocab_size, np.float32)
    bias_V[[known, 3, MASK]] = 3.0, 9.0, 9.0  # </s> and <mask> cannot be generated

    def change(params):
        params = jax.tree.map(jnp.zeros_like, params)
        params["head"]["output"]["bias"] = jnp.asarray(bias_V)
        return params

    result = evaluate_infilling(run_of(corpus, change), [corpus.documents("valid")], 48)
    assert result["n"] == 48 and result["accuracy"] == pytest.approx(count / 48) and count
    log_p_V = bias_V - np.log(np.exp(bias_V[16:]).sum())
    nats = -sum(log_p_V[word.tokens_L[word.start : word.stop]].sum() for word in words)
    bits = nats / math.log(2) / sum(word.bytes for word in words)
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert 0 < result["stderr"] < 0.2 and result["bits_per_byte_stderr"] > 0
    assert result["tokens_per_word"] == np.mean([word.stop - word.start for word in words])


def confident_order(run, word, logits):
    """Returns the log-likelihood of a word, one forward pass per token, without batches."""
    total, is_correct = 0.0, True
    tokens = np.zeros(run.config.seq_len, np.int32)
    tokens[: len(word.tokens_L)] = word.tokens_L
    tokens[word.start : word.stop] = MASK
    while (masked := np.flatnonzero(tokens == MASK)).size:
        logits_LxV = np.array(logits(tokens, len(word.tokens_L)), np.float64)
        logits_LxV[:, :16] = -np.inf
        log_p_LxV = logits_LxV - np.log(np.exp(logits_LxV).sum(1, keepdims=True))
        position = masked[log_p_LxV[masked - 1].max(1).argmax()]
        target = word.tokens_L[position]
        total += log_p_LxV[position - 1, target]
        is_correct &= log_p_LxV[position - 1].argmax() == target
        tokens[position] = target
    return total, is_correct


@pytest.mark.parametrize("devices", [1, 4])
def test_predictions_equal_those_of_each_word_alone(corpus, words, devices):
    run = run_of(corpus, devices=devices)

    @jax.jit
    def logits(tokens_L, length):
        starts_1xL = jnp.zeros_like(tokens_L)[None]
        return bind(run.config.model, run.params).logits(tokens_L[None], starts_1xL, starts_1xL + length)[0]

    longest = sorted(words, key=lambda word: word.start - word.stop)[:6]
    log_p_N, _ = predict_words(run, longest + words[:6])
    alone_N = [confident_order(run, word, logits)[0] for word in longest + words[:6]]
    np.testing.assert_allclose(log_p_N, alone_N, rtol=1e-4, atol=1e-4)
    assert max(word.stop - word.start for word in longest) > 2


def test_a_word_counts_if_and_only_if_greedy_unmasking_generates_it(corpus, words):
    """The answers are what the model generates for half of the words, and other text for the others."""
    run = run_of(corpus)
    masked = []
    for word in words:
        tokens = word.tokens_L.tolist()
        tokens[word.start : word.stop] = [MASK] * (word.stop - word.start)
        masked.append(tokens)
    states = infill(
        freeze(run.config.model), run.params, masked, SamplingParams(0.0), UnmaskingParams(),
        run.tokenizer.special,
    )  # fmt: skip
    *_, filled = states
    answers = [
        word._replace(tokens_L=np.array(text, np.int32)) if i % 2 else word
        for i, (word, text) in enumerate(zip(words, filled, strict=True))
    ]
    _, is_correct_N = predict_words(run, answers)
    expected = [text == word.tokens_L.tolist() for text, word in zip(filled, answers, strict=True)]
    assert is_correct_N.tolist() == expected
    assert 20 < sum(expected) < 40


def test_a_diverged_model_is_a_user_error(corpus, words):
    run = run_of(corpus, lambda params: jax.tree.map(lambda p: p * jnp.nan, params))
    with pytest.raises(UserError, match="log-likelihood is not finite, because training diverged"):
        predict_words(run, words[:2])


def test_text_without_words_is_reported(tmp_path, corpus, corpus_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} + 7"}) + "\n" for i in range(20)))
    recipe = Recipe(
        input=str(tmp_path / "a.jsonl"), tokenizer=str(corpus_path / "tokenizer.model"), valid_fraction=0.5
    )
    build(recipe, str(tmp_path / "corpus"), workers=1, quiet=True)
    documents = Corpus(str(tmp_path / "corpus")).documents("valid")
    result = evaluate_infilling(run_of(corpus), [documents], 8)
    assert (result["n"], result["accuracy"], result["stderr"]) == (0, None, None)
    results = {"workdir": "run", "checkpoint": 1, "tasks": {}, "infilling": result}
    assert "single words" in results_table(results, ["masked"])
    assert "infilling was not measured" in results_warnings(results)[0]


def test_results_are_kept_until_they_are_measured_again():
    old = {"tasks": {}, "infilling": {"n": 8}}
    assert merge(old, {"tasks": {}})["infilling"] == {"n": 8}
    assert merge(old, {"tasks": {}, "infilling": {"n": 4}})["infilling"] == {"n": 4}
    assert "infilling" not in merge({}, {"tasks": {}})
