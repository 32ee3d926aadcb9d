"""Scores of completions that share the forward pass over their context."""

import jax
import numpy as np
import pytest

from dualsm.config import default_config, freeze
from dualsm.devices import sharding
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Scorer
from dualsm.evaluation.shared_context import batch_rows, fill_rows, make_groups, pack
from dualsm.model.transformer import init_params
from tests.micro import micro_config

SWITCHES = [{}, {"num_kv_heads": 1, "no_rope_layer_interval": 2, "norm_placement": "post"}]


def make_scorer(corpus, devices=1, **switches):
    config = micro_config().model
    config.vocab_size = corpus.vocab_size
    config.update(switches)
    params = jax.tree.map(lambda p: 3 * p, init_params(config, jax.random.key(0)))
    mesh = sharding.make_mesh(default_config().mesh, jax.devices()[:devices])
    return Scorer(freeze(config), params, corpus.tokenizer(), mesh)


def random_pairs(seed, contexts=8, most=5):
    """Returns pairs in random order: contexts of 1 to 60 tokens, with 1 to `most` short completions each."""
    rng = np.random.default_rng(seed)
    tokens = lambda low, high: rng.integers(20, 500, rng.integers(low, high)).tolist()  # noqa: E731
    pairs = []
    for _ in range(contexts):
        context = tokens(1, 31)
        pairs += [(context, tokens(1, 10)) for _ in range(rng.integers(1, most + 1))]
    return [pairs[i] for i in rng.permutation(len(pairs))]


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("mode", ["causal", "prefix"])
def test_shared_contexts_do_not_change_scores(corpus, mode, switches):
    scorer, params = make_scorer(corpus, **switches), ScoringParams(mode)
    pairs = random_pairs(seed=0)
    together = scorer.score_tokens(pairs, params, quiet=True)
    alone = [scorer.score_tokens([pair], params, quiet=True) for pair in pairs]
    expected = [float(scores.log_likelihood_N[0]) for scores in alone]
    np.testing.assert_allclose(together.log_likelihood_N, expected, rtol=1e-5, atol=1e-4)
    assert together.greedy_N.tolist() == [bool(scores.greedy_N[0]) for scores in alone]


def test_groups_are_sharded_over_devices(corpus):
    pairs, params = random_pairs(seed=1), ScoringParams("prefix")
    one, eight = (make_scorer(corpus, devices).score_tokens(pairs, params, quiet=True) for devices in (1, 8))
    np.testing.assert_allclose(one.log_likelihood_N, eight.log_likelihood_N, rtol=1e-5, atol=1e-4)


def test_the_likeliest_tokens_of_a_shared_context_are_greedy(corpus):
    scorer, context, completion = make_scorer(corpus), list(range(100, 140)), []
    for _ in range(3):
        tokens = [[*completion, token] for token in range(corpus.vocab_size)]
        scores = scorer.score_tokens([(context, t) for t in tokens], ScoringParams("causal"), quiet=True)
        completion = tokens[int(np.nanargmax(scores.log_likelihood_N))]
    others = [[*completion[:-1], completion[-1] ^ 1], [completion[0] ^ 1]]
    pairs = [(context, answer) for answer in (completion, *others)]
    scores = scorer.score_tokens(pairs, ScoringParams("causal"), quiet=True)
    assert scores.greedy_N.tolist() == [True, False, False]


def test_rows_contain_every_context_once_and_every_completion():
    pairs = [((2, *context), tuple(completion)) for context, completion in random_pairs(seed=2, most=6)]
    rows = list(fill_rows(make_groups(pairs), row_tokens=64))
    groups = [group for row in rows for group in row]
    assert sorted(item for group in groups for item in group.items) == list(range(len(pairs)))
    assert sorted(group.context for group in groups) == sorted({context for context, _ in pairs})
    assert all(sum(group.size() for group in row) <= 64 or len(row) == 1 for row in rows)
    for group in groups:
        assert [(group.context, completion) for completion in group.completions] == [
            pairs[i] for i in group.items
        ]


def test_packed_indices_recover_every_text():
    pairs = [((2, *context), tuple(completion)) for context, completion in random_pairs(seed=3)]
    rows = list(fill_rows(make_groups(pairs), row_tokens=128))
    packed = pack(rows, row_tokens=128, num_rows=len(rows) + 1, pad=0)
    per_group = packed.inside_NxRxW.shape[1] // packed.context_NxBxL.shape[1]
    for n, row in enumerate(rows):
        scored = 0
        for b, group in enumerate(row):
            context = packed.context_NxBxL[n, b, packed.offset_NxB[n, b] :]
            assert packed.tokens_NxT[n, context].tolist() == list(group.context)
            for c, completion in enumerate(group.completions):
                size = len(completion) - 1
                inside = packed.inside_NxRxW[n, b * per_group + c, :size]
                text = np.concatenate([context, inside])
                assert packed.tokens_NxT[n, inside].tolist() == list(completion[:-1])
                assert packed.position_NxT[n, text].tolist() == list(range(len(text)))
                where = slice(scored, scored + size + 1)
                assert packed.scored_NxQ[n, where].tolist() == text[-size - 1 :].tolist()
                assert packed.target_NxQ[n, where].tolist() == list(completion)
                scored += size + 1


def test_later_groups_fill_the_rest_of_a_row():
    rng, pairs = np.random.default_rng(0), []
    for i in range(400):
        context = (2, i, *[5] * rng.integers(10, 70))
        pairs += [(context, (answer, *[6] * rng.integers(10, 50))) for answer in range(4)]
    rows = list(fill_rows(make_groups(pairs), row_tokens=2048))
    tokens = sum(group.size() for row in rows for group in row)
    assert tokens > 0.97 * 2048 * (len(rows) - 1)


def test_a_long_group_has_a_row_of_its_own():
    long = (tuple(range(2, 102)), (7, 8, 9))
    rows = list(fill_rows(make_groups([((2, 3), (5,)), long, ((2, 4), (6,))]), row_tokens=64))
    assert [len(row) for row in rows] == [1, 2]
    assert pack(rows, row_tokens=64, num_rows=2, pad=0).tokens_NxT.shape == (2, 128)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_short_contexts_do_not_share_an_array_with_a_long_one(num_rows):
    """Padding for attention would have 128 times the length of the long context."""
    pairs = [(tuple(range(2, 1002)), (7, 8))] + [((2, 3, i), (5, 6)) for i in range(100)]
    rows = list(fill_rows(make_groups(pairs), row_tokens=2048))
    batches = list(batch_rows(rows, row_tokens=2048, num_rows=num_rows))
    assert sum(len(row) for batch in batches for row in batch) == 101
    packed = [pack(batch, row_tokens=2048, num_rows=num_rows, pad=0) for batch in batches]
    assert max(p.context_NxBxL[0].size for p in packed) <= 16 * 2048
    assert len(batches) <= 3
