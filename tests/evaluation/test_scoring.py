"""Scores of a tiny model, compared with brute force."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import default_config, freeze
from dualsm.devices import sharding
from dualsm.evaluation.modes import MODES, ScoringParams
from dualsm.evaluation.scoring import Item, Scorer, encode_pair
from dualsm.model.transformer import bind, init_params
from dualsm.process.errors import UserError
from tests.micro import micro_config

CONTEXT, COMPLETION = [300, 41, 62, 300], [41, 62, 77, 300, 41]


@pytest.fixture(scope="module")
def config(corpus):
    config = micro_config().model
    config.vocab_size = corpus.vocab_size
    return freeze(config)


@pytest.fixture(scope="module")
def params(config):
    fresh = init_params(config, jax.random.key(0))
    return jax.tree.map(lambda p: 3 * p, fresh)


@pytest.fixture(scope="module")
def scorer(config, params, corpus):
    mesh = sharding.make_mesh(default_config().mesh, jax.devices()[:1])
    return Scorer(config, params, corpus.tokenizer(), mesh)


@pytest.fixture(scope="module")
def log_p(config, params):
    """Returns log p(token at a position | visible tokens), from a separate forward pass without padding."""
    model = bind(config, params)

    @functools.cache
    def distribution(tokens, place, prefix_end):
        tokens = jnp.asarray(tokens)[None]
        ends = jnp.maximum(jnp.arange(1, tokens.shape[1] + 1), prefix_end)[None]
        logits = model.logits(tokens, jnp.zeros_like(tokens), ends)[0, place - 1]
        return np.asarray(jax.nn.log_softmax(logits))

    def log_p(tokens, place, token, prefix_end=0):
        return float(distribution(tuple(tokens), place, prefix_end)[token])

    return log_p


def score(scorer, scoring, *pairs):
    return scorer.score_tokens(pairs or [(CONTEXT, COMPLETION)], scoring, quiet=True).log_likelihood_N


def test_causal_is_the_product_of_next_token_probabilities(scorer, log_p):
    text = [2, *CONTEXT, *COMPLETION]
    expected = sum(log_p(text[:i], i, text[i]) for i in range(1 + len(CONTEXT), len(text)))
    assert score(scorer, ScoringParams("causal"))[0] == pytest.approx(expected, abs=1e-3)


def test_prefix_attends_bidirectionally_to_the_context(scorer, log_p):
    text, start = [2, *CONTEXT, *COMPLETION], 1 + len(CONTEXT)
    expected = sum(log_p(text[:i], i, text[i], prefix_end=start) for i in range(start, len(text)))
    ours = score(scorer, ScoringParams("prefix"))[0]
    assert ours == pytest.approx(expected, abs=1e-3)
    assert abs(ours - score(scorer, ScoringParams("causal"))[0]) > 0.01


def test_prefix_with_an_empty_context_is_causal(scorer):
    scores = [score(scorer, ScoringParams(mode), ([], COMPLETION))[0] for mode in ("causal", "prefix")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.parametrize("masks", [(1,), (3,), (1, 4)])
def test_masked_masks_n_tokens_from_each_position(scorer, log_p, masks):
    text, start = [2, *CONTEXT, *COMPLETION], 1 + len(CONTEXT)
    expected = 0.0
    for n in masks:
        for i in range(start, len(text)):
            seen = [4 if i <= j < i + n else token for j, token in enumerate(text)]
            expected += log_p(seen, i, text[i], prefix_end=len(text)) / len(masks)
    assert score(scorer, ScoringParams("masked", masks=masks))[0] == pytest.approx(expected, abs=2e-3)


def test_monte_carlo_converges_to_the_enumerated_bound(scorer, log_p):
    context, completion = CONTEXT[:2], COMPLETION[:3]
    text, start, size = [2, *context, *completion], 3, 3
    exact = 0.0
    for count in range(1, size + 1):
        subsets = list(itertools.combinations(range(size), count))
        for subset in subsets:
            seen = [4 if j - start in subset else token for j, token in enumerate(text)]
            total = sum(log_p(seen, start + i, completion[i], len(text)) for i in subset)
            exact += total * size / count / size / len(subsets)
    draws = [
        score(scorer, ScoringParams("monte_carlo", samples=64, seed=seed), (context, completion))[0]
        for seed in range(12)
    ]
    error = np.std(draws, ddof=1) / math.sqrt(len(draws))
    assert abs(np.mean(draws) - exact) < 4 * error + 1e-3
    few = [
        score(scorer, ScoringParams("monte_carlo", samples=4, seed=s), (context, completion))[0]
        for s in range(12)
    ]
    assert np.std(few) > 1.5 * np.std(draws)


def test_batching_padding_and_order_do_not_matter(scorer):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(16, 512, rng.integers(0, 40)).tolist(), rng.integers(16, 512, n).tolist())
        for n in rng.integers(1, 20, 12)
    ]
    modes = {"causal": {}, "prefix": {}, "masked": {"masks": (1, 4)}, "monte_carlo": {"samples": 8}}
    for mode, options in modes.items():
        scoring = ScoringParams(mode, **options)
        together = score(scorer, scoring, *pairs)
        alone = [score(scorer, scoring, pair)[0] for pair in pairs]
        np.testing.assert_allclose(together, alone, atol=1e-3)


def test_rows_are_sharded_over_devices(config, params, corpus, scorer):
    mesh = sharding.make_mesh(default_config().mesh, jax.devices())
    many = Scorer(config, params, corpus.tokenizer(), mesh)
    pairs = [(CONTEXT, COMPLETION), ([], COMPLETION), (CONTEXT[:1], COMPLETION[:2])]
    for mode in ("causal", "masked"):
        np.testing.assert_allclose(
            score(many, ScoringParams(mode), *pairs), score(scorer, ScoringParams(mode), *pairs), atol=1e-3
        )


def test_greedy_is_true_for_the_most_likely_completion(scorer, log_p):
    text = [2, *CONTEXT]
    for _ in range(3):
        text.append(likeliest(log_p, text))
    result = scorer.score_tokens(
        [(CONTEXT, text[5:]), (CONTEXT, [*text[5:7], 499 if text[7] != 499 else 498])],
        ScoringParams("causal"),
        quiet=True,
    )
    assert result.greedy_N.tolist() == [True, False]


def likeliest(log_p, text) -> int:
    return max(range(512), key=lambda token: log_p(text, len(text), token))


def test_long_contexts_are_truncated_on_the_left_and_counted(scorer):
    long = list(range(100, 140))
    result = scorer.score_tokens(
        [(long, COMPLETION), (long[-10:], COMPLETION)], ScoringParams("causal", max_length=16), quiet=True
    )
    assert result.truncated_N.tolist() == [True, False]
    assert result.log_likelihood_N[0] == pytest.approx(result.log_likelihood_N[1], abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_completions_longer_than_a_row_are_not_scored(scorer, mode):
    scoring = ScoringParams(mode, samples=2, max_length=16)
    fits, long = list(range(100, 115)), list(range(100, 116))
    pairs = [(CONTEXT, COMPLETION), (CONTEXT, long), (CONTEXT, []), (CONTEXT, fits)]
    result = scorer.score_tokens(pairs, scoring, quiet=True)
    assert np.isnan(result.log_likelihood_N).tolist() == [False, True, True, False]
    assert result.truncated_N.tolist() == [False, False, False, True]
    assert not result.greedy_N[1:3].any()
    expected = score(scorer, scoring, (CONTEXT, COMPLETION), ([], fits))
    np.testing.assert_allclose(result.log_likelihood_N[[0, 3]], expected, atol=1e-3)


def test_equal_items_have_equal_scores(scorer):
    """Bit for bit in any batch, and with the forward passes of one of them."""
    rng = np.random.default_rng(1)
    pairs = [(rng.integers(16, 512, n).tolist(), COMPLETION) for n in range(1, 40)]
    result = scorer.score_tokens([*pairs, *pairs[::-1]], ScoringParams("causal"), quiet=True)
    first, second = result.log_likelihood_N[: len(pairs)], result.log_likelihood_N[len(pairs) :]
    assert first.tolist() == second[::-1].tolist()
    assert result.forwards == len(pairs)


def test_empty_completions_are_rejected(scorer):
    with pytest.raises(UserError, match="is empty; remove the item"):
        scorer([Item("some context", "")], ScoringParams("causal"), quiet=True)


def test_context_and_completion_are_encoded_together(corpus):
    tokenizer = corpus.tokenizer()
    for context, completion in [("def main", "(self):"), ("a b ", "c"), ("", "import"), ("x", " = 1")]:
        first, rest = encode_pair(tokenizer, Item(context, completion))
        assert tokenizer.decode(first + rest) == context + completion
        assert rest
        assert tokenizer.decode(rest).endswith(completion)


def prepending(documents):
    """Returns a tokenizer that prepends a space to every text."""
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'dualsm[exchange]'")
    from dualsm.data.tokenizer_json import JsonTokenizer
    from tests.exchange.conftest import make_tokenizer_json, with_normalizers

    file = with_normalizers(make_tokenizer_json(documents[:200]), {"type": "Prepend", "prepend": " "})
    return JsonTokenizer(file.encode())


@pytest.mark.parametrize("prepended", ["", " "])
def test_tokens_of_a_completion_decode_to_it(corpus, documents, prepended):
    """For every split of a text; most splits inside a word are inside a token."""
    tokenizer = prepending(documents) if prepended else corpus.tokenizer()
    rng = np.random.default_rng(0)
    for text in documents[:200]:
        places = [i for i in range(1, len(text)) if not text[i - 1].isspace()]
        cut = int(rng.choice(places))
        first, rest = encode_pair(tokenizer, Item(text[:cut], text[cut:]))
        assert tokenizer.decode(first) == prepended + text[:cut]
        assert tokenizer.decode(rest) == text[cut:]


def test_equal_forward_passes_are_computed_once(scorer):
    one = scorer.score_tokens(
        [(CONTEXT, COMPLETION[:1])], ScoringParams("monte_carlo", samples=64), quiet=True
    )
    assert one.forwards == 1
    masked = scorer.score_tokens([(CONTEXT, COMPLETION)], ScoringParams("masked", masks=(1, 4)), quiet=True)
    assert masked.forwards == 2 * len(COMPLETION) - 1  # both mask the last token alone


def test_diverged_models_are_reported(config, params, corpus):
    mesh = sharding.make_mesh(default_config().mesh, jax.devices()[:1])
    broken = Scorer(config, jax.tree.map(lambda p: p * jnp.nan, params), corpus.tokenizer(), mesh)
    with pytest.raises(UserError, match="diverged"):
        score(broken, ScoringParams("causal"))


def test_unknown_modes_are_rejected():
    with pytest.raises(UserError, match="telepathy"):
        ScoringParams("telepathy")
