"""Acceptance of drafts on held-out text."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dualsm.config import freeze
from dualsm.evaluation.acceptance import accepted_prefixes, evaluate_acceptance
from dualsm.evaluation.segments import read_segments
from dualsm.generation.autoregressive import prefill
from dualsm.generation.draft_counts import DraftCounts
from dualsm.generation.prompt_batches import pad_batch, prompt_keys
from dualsm.generation.sampling_params import SamplingParams
from dualsm.generation.speculative import SpeculationParams, generate
from dualsm.model.transformer import init_params
from dualsm.objectives.example import SpecialIds
from dualsm.rundir.results import merge
from tests.micro import micro_config

SPECIAL, VOCABULARY, DRAFT = SpecialIds(), 64, 5


@pytest.fixture(scope="module")
def run():
    """Returns a run of a model that is not trained; its bias makes a few tokens likely after every text."""
    config = micro_config()
    config.model.vocab_size = VOCABULARY
    params = init_params(config.model, jax.random.key(3))
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)
    params["head"]["output"]["bias"] = 4 * jax.random.normal(jax.random.key(4), VOCABULARY)
    return SimpleNamespace(config=config, params=params, tokenizer=SimpleNamespace(special=SPECIAL))


class Texts:
    """Held-out documents in memory, with the interface of `Documents` that is used."""

    def __init__(self, *lengths: int):
        rng = np.random.default_rng(0)
        self.texts = [np.array([2, *rng.integers(16, VOCABULARY, n - 1)], np.int32) for n in lengths]
        self.lengths_N = np.array(lengths, np.int32)

    def read(self, document_S, start_S, stop_S):
        return [self.texts[i][a:b] for i, a, b in zip(document_S, start_S, stop_S, strict=True)]


def test_greedy_acceptance_equals_the_accepted_tokens_of_a_draft(run):
    config, texts = freeze(run.config.model), Texts(*[20] * 12).texts
    length_B = np.arange(3, 15, dtype=np.int32)
    tokens_BxL, full_B = pad_batch(texts, SPECIAL.pad)
    keys_B = prompt_keys(0, texts)
    state = prefill(
        config, run.params, tokens_BxL, full_B, keys_B, size=40, bidirectional=False, special=SPECIAL
    )
    greedy_BxP, sampled_BxP = accepted_prefixes(
        config, run.params, state.tokens_BxS, length_B, state.cache, keys_B, size=DRAFT, special=SPECIAL
    )
    expected = []
    for text, length in zip(texts, length_B, strict=True):
        counts, draft = DraftCounts(), SpeculationParams(DRAFT)
        states = generate(
            config, run.params, [text[:length].tolist()], 20, SamplingParams(0.0), SPECIAL, draft,
            counts=counts, yield_every=1,
        )  # fmt: skip
        for _ in range(3):  # the prompt, the prompt after compilation, the text after the first draft
            (last,) = next(states)
        assert last[-1] != SPECIAL.eos
        expected.append(counts.accepted)
    np.testing.assert_allclose(greedy_BxP.sum(1), expected)
    assert len(set(expected)) > 2
    assert (np.diff(sampled_BxP, axis=1) <= 0).all()
    assert (sampled_BxP[:, 0] == 1).all()


def test_a_model_whose_modes_agree_accepts_all_drafts(run):
    bias_V = np.where(np.arange(VOCABULARY) == 40, 1e4, 0).astype(np.float32)
    head = run.params["head"] | {"output": run.params["head"]["output"] | {"bias": bias_V}}
    agreeing = SimpleNamespace(**vars(run) | {"params": run.params | {"head": head}})
    result = evaluate_acceptance(agreeing, [Texts(70, 9)], DRAFT)
    for name in ("greedy", "sampled"):
        assert result[name]["accepted_per_draft"] == pytest.approx(DRAFT)
        assert result[name]["stderr"] == pytest.approx(0, abs=1e-6)
        assert result[name]["tokens_per_forward"] == pytest.approx((DRAFT + 1) / 2)
    assert result["settings"]["segments"] == 4  # the long document has three
    assert result["n"] == 16
    result = evaluate_acceptance(run, [Texts(70), Texts(9)], DRAFT)
    assert 1 < result["greedy"]["accepted_per_draft"] < DRAFT
    assert result["sampled"]["by_position"][0] == 1


def test_segments_are_spread_over_the_documents():
    texts = Texts(1, 33, 2, 64, 32)
    segments = read_segments([texts], 32, 128)
    assert [len(segment.tokens) for segment in segments] == [32, 2, 32, 32, 32]  # not the single tokens
    assert [segment.document for segment in segments] == [1, 2, 3, 3, 4]
    two = read_segments([Texts(1, 33), Texts(2, 64, 32)], 32, 128)
    assert [len(segment.tokens) for segment in two] == [32, 2, 32, 32, 32]
    assert [(segment.source, segment.document) for segment in two] == [(0, 1), (1, 0), (1, 1), (1, 1), (1, 2)]
    assert [segment.tokens.tolist() for segment in read_segments([texts], 32, 2)] == [
        texts.texts[1][:32].tolist(),
        texts.texts[3][:32].tolist(),
    ]


def test_acceptance_is_kept_until_it_is_measured_again():
    old = {"tasks": {}, "acceptance": {"draft": 8}}
    assert merge(old, {"tasks": {}})["acceptance"] == {"draft": 8}
    assert merge(old, {"tasks": {}, "acceptance": {"draft": 4}})["acceptance"] == {"draft": 4}
    assert "acceptance" not in merge({}, {"tasks": {}})
