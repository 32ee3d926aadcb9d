"""Baselines of tasks: the untrained model and word frequencies."""

import copy
import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dualsm.data.corpus import Corpus
from dualsm.evaluation.baselines import BASELINES, default_baselines, open_baselines, unigram_log_probs
from dualsm.evaluation.evaluate_run import evaluate_run
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.results_table import results_table
from dualsm.evaluation.scoring import Item
from dualsm.evaluation.spec import EvalSpec
from dualsm.evaluation.task_formats import Question
from dualsm.evaluation.task_metrics import above
from dualsm.model.transformer import init_params
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import open_run

PAIRS = [
    Question((Item("", "import os"), Item("", "import of")), 0, "imports"),
    Question((Item("", "return self"), Item("", "selfless returning")), 0, "returns"),
]


@pytest.fixture(scope="module")
def run(corpus_path, tmp_path_factory):
    from dualsm.training.loop import train
    from tests.micro import micro_config

    config = micro_config(corpus_path)
    config.mesh.data, config.valid.objectives = -1, ""
    path = tmp_path_factory.mktemp("baselines") / "run"
    assert train(config, path)
    return open_run(path)


def spec(*baselines, mode="causal"):
    return EvalSpec(["blimp"], [mode], "eval", baselines=baselines)


def test_unigram_scores_are_the_frequencies_of_the_training_text(run, corpus_path):
    corpus = Corpus(str(corpus_path))
    documents = corpus.documents("train")
    tokens = np.concatenate(documents.read(range(len(documents.lengths_N))))
    log_prob_V = unigram_log_probs(corpus)
    assert np.exp(log_prob_V).sum() == pytest.approx(1)
    count_V = np.bincount(tokens, minlength=corpus.vocab_size)
    np.testing.assert_allclose(np.exp(log_prob_V) * (len(tokens) + corpus.vocab_size), count_V + 1)
    baseline = open_baselines(["unigram"], run)["unigram"]
    completion = run.tokenizer.encode(["import os"])[0]
    scores = baseline([Item("def main", "(self):"), Item("", "import os")], ScoringParams("causal"), "")
    assert scores.log_likelihood_N[1] == pytest.approx(log_prob_V[completion].sum())


def test_frequencies_of_a_part_of_the_text_are_close(corpus_path):
    corpus = Corpus(str(corpus_path))
    log_prob_V = unigram_log_probs(corpus, max_tokens=20_000)
    difference = np.exp(log_prob_V) * np.abs(log_prob_V - unigram_log_probs(corpus))
    assert 0 < difference.sum() < 0.5


def test_untrained_scores_are_those_of_the_initial_parameters(run):
    params = init_params(run.config.model, jax.random.key(run.config.seed))
    params = jax.tree.map(
        lambda initial, trained: jax.device_put(initial, trained.sharding), params, run.params
    )
    (initial,) = evaluate_run(dataclasses.replace(run, params=params), spec(), {"blimp": PAIRS})
    (trained,) = evaluate_run(run, spec("untrained"), {"blimp": PAIRS})
    initial, trained = (results["tasks"]["blimp"]["causal"] for results in (initial, trained))
    baseline = trained["baselines"]["untrained"]
    assert baseline["bits_per_byte"] == pytest.approx(initial["answer"]["bits_per_byte"])
    assert baseline["score"] == initial["score"]
    assert trained["answer"]["bits_per_byte"] < baseline["bits_per_byte"]


def test_slor_needs_the_unigram_baseline(run):
    for names in ((), BASELINES):
        (results,) = evaluate_run(run, spec(*names, mode="masked"), {"blimp": PAIRS})
        entry = results["tasks"]["blimp"]["masked"]
        assert ("slor" in entry["metrics"]) == bool(names)
        assert tuple(entry["baselines"]) == names


def test_scores_above_baselines(run):
    """The best baseline is the floor, or guessing if that is higher."""
    (results,) = evaluate_run(run, spec(*BASELINES), {"blimp": PAIRS})
    entry = results["tasks"]["blimp"]["causal"]
    floor = max(0.5, *(baseline["score"] for baseline in entry["baselines"].values()))
    assert entry["above_baselines"] == pytest.approx(above(entry["score"], floor))
    assert entry["normalised"] == pytest.approx(above(entry["score"], 0.5))
    table = results_table(results, ["causal"])
    assert "mean (0 guessing, 100 perfect)" in table
    assert "mean (0 best baseline, 100 perfect)" in table
    accuracy = 100 * entry["metrics"]["slor"]["accuracy"]
    assert any(line.split()[:2] == ["slor", f"{accuracy:.1f}"] for line in table.splitlines())
    margin = f"{entry['answer']['margin']:.3f} ± {entry['answer']['margin_stderr']:.3f}"
    assert any(line.split() == ["margin", *margin.split()] for line in table.splitlines())


def test_default_baselines_need_only_what_the_run_has(run, tmp_path, capsys):
    assert default_baselines(run) == BASELINES
    assert capsys.readouterr().err == ""
    config = copy.deepcopy(run.config)
    config.data.path = str(tmp_path / "moved")
    assert default_baselines(dataclasses.replace(run, config=config)) == ("untrained",)
    warning = f"no unigram baseline: config.data.path: no corpus at '{tmp_path / 'moved'}'"
    assert warning in capsys.readouterr().err


def test_corpus_with_another_tokenizer_is_rejected(run):
    other = dataclasses.replace(run, tokenizer=SimpleNamespace(sha256=lambda: "other"))  # any other tokenizer
    with pytest.raises(UserError, match="another tokenizer than the run's"):
        open_baselines(["unigram"], other)


def test_unknown_baseline_is_rejected():
    with pytest.raises(UserError, match="unknown baseline 'random'; choose from untrained, unigram"):
        spec("random").check()
