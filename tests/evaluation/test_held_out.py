"""Held-out losses by document and domain, and their standard errors."""

import json

import jax
import numpy as np
import pytest

from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.devices import sharding
from dualsm.evaluation.bootstrap import bootstrap_stderr
from dualsm.evaluation.held_out import DocumentSums, domain_entries, evaluate_held_out
from dualsm.evaluation.results_table import results_table
from dualsm.model.transformer import bind, init_params
from dualsm.objectives.sources import Source
from dualsm.rundir.trained_run import TrainedRun
from dualsm.training.run_corpora import RunCorpus
from dualsm.training.valid_rows import valid_rows
from tests.micro import micro_config

OBJECTIVES = ("causal", "prefix", "masked_diffusion")


@pytest.fixture(scope="module")
def labeled(documents, corpus_path, tmp_path_factory):
    """Returns a corpus whose held-out documents have three domains of different text."""
    folder = tmp_path_factory.mktemp("labeled")
    sources = [("numbers", "7 8 9 10"), ("code", ""), ("names", "Ada Grace ")]
    lines = [
        json.dumps({"text": prefix * (1 + i % 4) + text, "source": name})
        for i, text in enumerate(documents[:90])
        for name, prefix in [sources[i % 3]]
    ]
    (folder / "valid.jsonl").write_text("\n".join(lines))
    (folder / "train.jsonl").write_text('{"text": "to train on"}')
    recipe = Recipe(
        input=str(folder / "train.jsonl"), valid_input=str(folder / "valid.jsonl"),
        tokenizer=str(corpus_path / "tokenizer.model"), domain_key="source",
    )  # fmt: skip
    build(recipe, str(folder / "corpus"), workers=1, quiet=True)
    return Corpus(str(folder / "corpus"))


def run_of(corpus, scale=3.0, devices=1):
    config = micro_config()
    config.model.vocab_size, config.seq_len, config.mesh.data = corpus.vocab_size, 32, devices
    params = jax.tree.map(lambda p: p * scale, init_params(config.model, jax.random.key(0)))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    return TrainedRun(None, config, corpus.tokenizer(), 0, params, mesh)


def evaluate(run, *corpora, objectives=OBJECTIVES, samples=2, by_document=False):
    names = [""] if len(corpora) == 1 else [f"s{i}" for i in range(len(corpora))]
    sources = [RunCorpus(Source(n, "", 1), c) for n, c in zip(names, corpora, strict=True)]
    return dict(evaluate_held_out(run, sources, objectives, samples, by_document))


@pytest.fixture(scope="module")
def results(labeled):
    return evaluate(run_of(labeled), labeled)


def test_causal_losses_of_domains_equal_a_direct_computation(labeled, results):
    """Each token of the packed stream counts for its own document, also where a row cuts the document."""
    run, documents = run_of(labeled), labeled.documents("valid")
    tokenizer = run.tokenizer
    rows = valid_rows(documents, 32, 0, tokenizer.special, tokenizer.token_bytes())
    starts_VxL = [[np.flatnonzero(row == d)[0] for d in row[:-1]] for row in rows.documents_VxL1]
    inputs_VxL = rows.tokens_VxL1[:, :-1]
    ends_VxL = np.broadcast_to(np.arange(1, 33), inputs_VxL.shape)
    logits = bind(run.config.model, run.params).logits(inputs_VxL, np.array(starts_VxL), ends_VxL)
    nll_VxL = -np.take_along_axis(jax.nn.log_softmax(logits), rows.tokens_VxL1[:, 1:, None], 2)[..., 0]
    stream_T = np.repeat(np.arange(len(documents)), documents.lengths_N)  # document of each token
    is_first_T = np.diff(stream_T, prepend=-1) > 0
    nll_T = np.concatenate([[0], np.asarray(nll_VxL).ravel()])[: len(stream_T)]
    for index, domain in enumerate(documents.domains):
        scored_T = (documents.domain_N[stream_T] == index) & ~is_first_T
        part = results["causal"]["domains"][domain]
        assert part["nats_per_token"] == pytest.approx(nll_T[scored_T].mean(), rel=1e-5)
        assert part["weight"] == 2 * scored_T.sum()
        assert part["documents"] == (documents.domain_N == index).sum()
        bits = nll_T[scored_T].sum() / np.log(2) / documents.bytes_N[documents.domain_N == index].sum()
        assert part["bits_per_byte"] == pytest.approx(bits, rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_of_domains_recombine_into_the_total(results, objective):
    total = results[objective]
    parts = total["domains"].values()
    assert len(parts) == 3 and len({round(part["nats_per_token"], 2) for part in parts}) == 3
    nats = sum(part["weight"] * part["nats_per_token"] for part in parts)
    assert nats / total["weight"] == pytest.approx(total["nats_per_token"], rel=1e-12)
    assert sum(part["weight"] for part in parts) == pytest.approx(total["weight"], rel=1e-12)
    assert sum(part["documents"] for part in parts) == total["documents"]


def test_sums_of_documents_recombine_into_the_losses(labeled, results):
    assert "by_document" not in results["causal"]
    for objective, found in evaluate(run_of(labeled), labeled, by_document=True).items():
        part = found.pop("by_document")
        assert found | {"seconds": 0} == results[objective] | {"seconds": 0}
        domain_N, nats_N, weight_N = (np.array(part[key]) for key in ("domain", "nats", "weight"))
        assert len(domain_N) == found["documents"]
        assert nats_N.sum() / weight_N.sum() == pytest.approx(found["nats_per_token"], rel=1e-12)
        for name, entry in found["domains"].items():
            inside_N = domain_N == name
            loss = nats_N[inside_N].sum() / weight_N[inside_N].sum()
            assert loss == pytest.approx(entry["nats_per_token"], rel=1e-12)
        bits = nats_N.sum() / weight_N.sum() * sum(part["tokens"]) / sum(part["bytes"]) / np.log(2)
        assert bits == pytest.approx(found["bits_per_byte"], rel=1e-12)


def test_a_model_with_equal_logits_has_no_error(labeled):
    """Every token has the loss ln V, so neither the choice of documents nor that of masks matters."""
    for result in evaluate(run_of(labeled, scale=0.0), labeled).values():
        for part in (result, *result["domains"].values()):
            assert part["nats_per_token"] == pytest.approx(np.log(labeled.vocab_size), rel=1e-6)
            assert part["stderr"] < 1e-6
        assert result["bits_per_byte_stderr"] > 1e-3  # documents differ in bytes per token


def test_devices_do_not_matter(labeled, results):
    found = evaluate(run_of(labeled, devices=4), labeled)
    for objective in OBJECTIVES:
        for name, part in results[objective]["domains"].items():
            other = found[objective]["domains"][name]
            assert other["nats_per_token"] == pytest.approx(part["nats_per_token"], rel=1e-4)
            assert other["stderr"] == pytest.approx(part["stderr"], rel=1e-2)


def test_corpora_without_domains_have_only_a_total(corpus):
    (result,) = evaluate(run_of(corpus), corpus, objectives=["causal"], samples=1).values()
    assert "domains" not in result
    assert 0 < result["stderr"] < 1


def test_domains_of_several_sources_are_joined_if_all_have_them(labeled, corpus, results):
    run = run_of(labeled)
    found = evaluate(run, labeled, labeled, objectives=["causal"])
    assert list(found) == ["causal", "s0/causal", "s1/causal"]
    one, both = results["causal"], found["causal"]
    assert found["s0/causal"]["domains"] == one["domains"]
    assert both["nats_per_token"] == pytest.approx(one["nats_per_token"], rel=1e-9)
    assert both["stderr"] == pytest.approx(one["stderr"] / np.sqrt(2), rel=0.15)
    assert both["domains"]["code"]["documents"] == 2 * one["domains"]["code"]["documents"]
    mixed = evaluate(run, labeled, corpus, objectives=["causal"])
    assert "domains" not in mixed["causal"] and "domains" in mixed["s0/causal"]


def test_the_table_shows_domains_and_errors(results):
    text = results_table({"workdir": "run", "checkpoint": 3, "tasks": {}, "held_out": results}, ["causal"])
    part = results["prefix"]["domains"]["names"]
    assert f"{part['nats_per_token']:.4f} ± {part['stderr']:.4f}" in text
    assert text.count("  names") == 3


def test_a_domain_without_masked_tokens_has_no_loss():
    domain_N = np.array(["long", "short", "long"])
    nats_N, weight_N = np.array([3.0, 0.0, 1.0]), np.array([2.0, 0.0, 1.0])
    found = domain_entries(
        DocumentSums(nats_N, weight_N, np.ones(3), np.ones(3), domain_N), "masked_diffusion"
    )
    assert list(found) == ["long"]
    assert found["long"]["nats_per_token"] == pytest.approx(4 / 3)


def test_the_table_names_the_moving_average(results):
    parts = {"workdir": "run", "checkpoint": 3, "tasks": {}, "held_out": results}
    assert results_table(parts, []).startswith("run, step 3\n")
    averaged = results_table(parts | {"parameters": "ema"}, [])
    assert averaged.startswith("run, step 3, moving average of the weights\n")


def ratio(sums_RxS):
    return sums_RxS[:, 0] / sums_RxS[:, 1]


def test_the_error_of_a_mean_is_the_usual_one():
    values_N = np.random.default_rng(0).gamma(2.0, size=50)
    (error,) = bootstrap_stderr(np.stack([values_N, np.ones(50)], 1), ratio, resamples=20_000)
    assert error == pytest.approx(values_N.std(ddof=1) / np.sqrt(50), rel=0.02)


@pytest.mark.parametrize("documents", [40, 15_000])  # the latter are resampled in groups
def test_intervals_cover_the_ratio_of_a_known_distribution(documents):
    """Long documents are easier: the ratio differs from the mean loss of a document."""
    rng, covered, simulations = np.random.default_rng(1), 0, 200
    expected_n, expected_n2 = 20.0, 20.0**2 + 100.0
    truth = (3.5 * expected_n - 0.05 * expected_n2) / expected_n
    for _ in range(simulations):
        n_N = 10 + rng.exponential(10, documents)
        loss_N = 3.5 - 0.05 * n_N + rng.normal(0, 0.5, documents)
        sums_Nx2 = np.stack([n_N * loss_N, n_N], 1)
        (error,) = bootstrap_stderr(sums_Nx2, ratio, resamples=100 if documents < 100 else 40)
        covered += abs(sums_Nx2[:, 0].sum() / sums_Nx2[:, 1].sum() - truth) < 1.96 * error
    assert 0.9 <= covered / simulations <= 0.98
    assert abs(np.mean(loss_N) - truth) > 0.1 or documents < 100


def test_one_document_has_no_error():
    assert bootstrap_stderr(np.ones((1, 2)), ratio, ratio) == [None, None]
