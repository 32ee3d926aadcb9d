"""Runs with several sources: batches, metrics, resuming, forks and errors."""

import json
import shutil

import jax
import numpy as np
import pytest

from dualsm.config import add_source
from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.evaluation import evaluate_run
from dualsm.evaluation.held_out import evaluate_held_out, open_held_out
from dualsm.process.errors import UserError
from dualsm.rundir.metrics import read_metrics
from dualsm.rundir.trained_run import open_run
from dualsm.training.loop import _Run, train
from dualsm.training.start import open_job
from dualsm.training.valid_rows import valid_rows
from dualsm.training.validation import SourceValidation, Validation
from tests.conftest import run_command
from tests.micro_sources import two_sources
from tests.processes import launch

from .test_resume import learned

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        yield


@pytest.fixture(scope="module")
def paths(corpus_path, other_corpus_path):
    return other_corpus_path, corpus_path


def source_config(paths, **changes):
    config = two_sources(*paths)
    config.model.num_layers, config.valid.objectives = 1, "causal"
    config.update_from_flattened_dict(changes)
    return config


def params_of(workdir):
    return jax.device_get(open_run(workdir).params)


def assert_same_weights(one, other):
    jax.tree.map(np.testing.assert_array_equal, params_of(one), params_of(other))


@pytest.fixture(scope="module")
def whole(paths, tmp_path_factory):
    """A run of a pair and an objective on one source, and of two objectives on the other; see `PAIRED`."""
    workdir = tmp_path_factory.mktemp("sources") / "whole"
    assert train(paired(paths), workdir)
    return workdir


PAIRED = {
    "sources.small.mixture.causal": 0.0,
    "sources.small.mixture.mir": 0.5,
    "model.dropout": 0.1,
    "optimizer.weight_decay_schedule.name": "linear",
    "ema.decay": 0.5,
    "ema.start": 2,
    "valid.parameters": "both",
}


def paired(paths, **changes):
    return source_config(paths, **PAIRED | changes)


@pytest.mark.parametrize(("processes", "share"), [(1, 0.3), (2, 0.3), (4, 0.3), (4, 0.1618), (4, 0.7071)])
def test_batches_do_not_depend_on_the_processes_and_repeat_each_source_exactly(
    paths, tmp_path, processes, share
):
    """The shares are fractions of a row, which rounding divides unequally between the steps."""
    shares = {"sources.small.share": share, "sources.large.share": 1 - share}
    config, corpora, mesh = open_job(source_config(paths, steps=16, **shares), tmp_path)
    run = _Run(config, tmp_path, corpora, mesh)
    source, size = run.batch_source, config.batch_size // processes
    counts = {name: np.zeros(512, int) for name in ("large", "small")}
    rows_SxK = np.zeros((config.steps, 2), int)
    for step in range(config.steps):
        object.__setattr__(source, "local_rows", np.arange(config.batch_size))
        joined = source[step]["tokens"]
        for process in range(processes):
            object.__setattr__(source, "local_rows", range(process * size, (process + 1) * size))
            np.testing.assert_array_equal(source[step]["tokens"], joined[process * size :][:size])
        corpus_B, _ = run.plan.row_sources(step)
        for k, count in enumerate(counts.values()):
            count += np.bincount(joined[corpus_B == k, :-1].ravel(), minlength=512)
            rows_SxK[step, k] = (corpus_B == k).sum()
    exact_SxK = np.arange(1, 17)[:, None] * config.batch_size * np.array([1 - share, share])
    assert np.abs(rows_SxK.cumsum(0) - exact_SxK).max() <= 0.5 + 1e-6
    assert len(set(rows_SxK[:, 1])) == 2
    for name, repetitions, (documents, order) in zip(counts, (1, 4), run.ordered, strict=True):
        unique = np.concatenate(documents.read(range(len(documents))))[: order.unique]
        np.testing.assert_array_equal(counts[name], repetitions * np.bincount(unique, minlength=512))
    assert [order.unique for _, order in run.ordered] == (rows_SxK.sum(0) * 32 // (1, 4)).tolist()


def test_one_source_trains_like_a_run_without_sources(paths, tmp_path):
    changes = {"steps": 4, "valid.every": 4}
    plain, one = (source_config(paths, **changes) for _ in range(2))
    plain.sources, plain.data.path, plain.repetitions = {}, str(paths[1]), 2
    one.sources = {}
    add_source(one, "all", str(paths[1]), 1.0, repetitions=2)
    for name, config in (("plain", plain), ("one", one)):
        assert train(config, tmp_path / name)
    assert_same_weights(tmp_path / "plain", tmp_path / "one")
    for a, b in zip(*(map(learned, read_metrics(tmp_path / name)) for name in ("plain", "one")), strict=True):
        assert {name: b[name] for name in a} == a
        added = {name.replace("all/", "").replace("/all", "") for name in b.keys() - a.keys()}
        assert added <= a.keys()


def test_losses_and_epochs_are_logged_per_source(whole):
    lines = {line["step"]: line for line in read_metrics(whole)}
    last = lines[12]
    assert last["tokens"] == 12 * (6 + 1) * 32 + 6 * 32  # of two rows of `small`, a pair or two sequences
    assert (last["epoch/small"], last["epoch/large"]) == (4, 1)
    names = {name for line in lines.values() for name in line if name.startswith("train/")}
    for name in ("large/causal", "large/masked_diffusion", "small/mir/causal", "small/masked_diffusion"):
        assert f"train/{name}/loss" in names
    assert "train/masked_diffusion/loss" in names and "train/mir/masked_input_causal/loss" in names
    for line in lines.values():
        of_sources = sorted(
            v for k, v in line.items() if k.endswith("/masked_diffusion/loss") and k.count("/") == 3
        )
        if len(of_sources) == 2 and "train/masked_diffusion/loss" in line:
            assert of_sources[0] <= line["train/masked_diffusion/loss"] <= of_sources[1]
        if "valid/causal/loss" in line:
            low, high = sorted(line[f"valid/{source}/causal/loss"] for source in ("small", "large"))
            assert low < line["valid/causal/loss"] < high


def test_held_out_losses_are_those_of_each_corpus_alone(whole, paths):
    run = open_run(whole)
    logged, nats, tokens = read_metrics(whole)[-1], [], []
    for name, path in zip(("small", "large"), paths, strict=True):
        corpus = Corpus(str(path))
        tokenizer = corpus.tokenizer()
        rows = valid_rows(corpus.documents("valid"), 32, 16, tokenizer.special, tokenizer.token_bytes())
        with jax.set_mesh(run.mesh):
            alone = Validation(run.config, ["causal"], tokenizer.special, rows, run.mesh)
            scores = SourceValidation({"": alone})(run.params)
            found = alone(run.params, "causal")
        assert scores["valid/causal/loss"] == pytest.approx(logged[f"valid/{name}/causal/loss"], rel=1e-5)
        nats.append(found[0])
        tokens.append(found[1])
    assert logged["valid/causal/loss"] == pytest.approx(sum(nats) / sum(tokens), rel=1e-5)


def test_a_stopped_run_resumes_bit_for_bit(whole, paths, tmp_path):
    assert not train(paired(paths), tmp_path, stop=lambda step: step == 5)
    assert train(paired(paths), tmp_path)
    assert_same_weights(whole, tmp_path)
    assert [*map(learned, read_metrics(tmp_path))] == [*map(learned, read_metrics(whole))]


def test_losses_do_not_depend_on_devices_and_accumulation(whole, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:4])
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "gradient_accumulation_steps": 2}
    assert train(paired(paths, **mesh), tmp_path)
    # The first validation scores a sample of the rows that depends on the accumulation.
    for a, b in zip(read_metrics(tmp_path)[1:], read_metrics(whole)[1:], strict=True):
        losses = [name for name in b if name.endswith("loss")]
        assert [a[name] for name in losses] == pytest.approx([b[name] for name in losses], abs=2e-5)


def test_two_processes_train_as_one(whole, paths, tmp_path):
    small, large = paths
    flags = ["mesh.data=2", "model.num_layers=1", "valid.objectives=causal"]
    flags += [f"{key}={value}" for key, value in PAIRED.items()]
    arguments = [f"--config=tests/micro_sources.py:{small},{large}", f"--workdir={tmp_path / 'run'}"]
    done = launch(2, 1, *arguments, *(f"--config.{flag}" for flag in flags))
    assert done.returncode == 0, done.stderr
    for a, b in zip(read_metrics(tmp_path / "run"), read_metrics(whole), strict=True):
        losses = [name for name in b if name.endswith("loss") or name.startswith("epoch")]
        assert [a[name] for name in losses] == pytest.approx([b[name] for name in losses], abs=2e-5)
    assert abs(b["valid/ema/causal/loss"] - b["valid/causal/loss"]) > 1e-3  # of the last step


def test_a_fork_changes_the_shares(whole, paths, tmp_path):
    start = {"start.run": str(whole), "start.step": 8}
    shares = {"sources.small.share": 0.5, "sources.large.share": 0.5}
    assert train(paired(paths, **start | shares), tmp_path / "other")
    assert read_metrics(tmp_path / "other")[-1]["epoch/small"] == 4
    with pytest.raises(UserError, match="another config .*sources.large.share: 0.75 -> 0.5"):
        train(paired(paths, **shares), whole)


def test_shares_change_without_recompilation(paths, tmp_path):
    schedule = {"sources_schedule.name": "linear", "sources_schedule.path": "1 small=0.75 large=0.25"}
    config, corpora, mesh = open_job(paired(paths, **schedule), tmp_path)
    run = _Run(config, tmp_path, corpora, mesh)
    with jax.set_mesh(mesh):
        state = run.init()
        for step in range(config.steps):
            state, _ = run.step(state, run._batch(run.batch_source[step]))
    assert run.step._cache_size() == 1
    assert len({tuple(np.bincount(run.plan.row_sources(step)[0])) for step in range(12)}) > 2


def test_evaluation_scores_each_source(whole):
    run = open_run(whole)
    results = dict(evaluate_held_out(run, open_held_out(run), ["causal"], samples=1))
    assert list(results) == ["causal", "large/causal", "small/causal"]
    parts = [results[f"{name}/causal"] for name in ("large", "small")]
    assert results["causal"]["n"] == sum(part["n"] for part in parts)
    low, high = sorted(part["nats_per_token"] for part in parts)
    assert low < results["causal"]["nats_per_token"] < high
    alone = dict(evaluate_held_out(run, open_held_out(run, parts[1]["settings"]["data"]), ["causal"], 1))
    assert alone["causal"]["nats_per_token"] == pytest.approx(parts[1]["nats_per_token"], rel=1e-5)


def test_moved_corpora_of_sources_are_scored(whole, paths, tmp_path):
    """`--data=NAME=PATH` replaces the path of a source; the others stay."""
    expected = dict(evaluate_held_out(open_run(whole), open_held_out(open_run(whole)), ["causal"], 1))
    shutil.copytree(paths[0], tmp_path / "moved")
    shutil.copytree(whole, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["sources"]["small"]["corpus"] = "nowhere"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    run = open_run(tmp_path / "run")
    with pytest.raises(UserError, match="config.sources.small.corpus: .*set --data=large=PATH,small=PATH"):
        evaluate_run.open_corpora_to_score(run, "")
    corpora = evaluate_run.open_corpora_to_score(run, f"small={tmp_path / 'moved'}")
    found = dict(evaluate_held_out(run, corpora, ["causal"], 1))
    for name, result in expected.items():
        assert found[name]["nats_per_token"] == result["nats_per_token"]


def fail_with(message, config, workdir):
    with pytest.raises(UserError, match=message) as error:
        train(config, workdir)
    assert "\n" not in str(error.value)
    assert not workdir.exists()


def test_corpora_that_do_not_fit_are_named_before_anything_is_written(paths, jsonl, tmp_path):
    small = Corpus(str(paths[0])).tokens("train")
    workdir = tmp_path / "run"
    steps = {"steps": small // (2 * 32) + 100, "sources.large.repetitions": 4}
    needed = steps["steps"] * 2 * 32
    fail_with(
        rf"config.sources.small: the corpus .* has {small:,} training tokens, but the source needs "
        rf"{needed:,} unique tokens \({needed:,} tokens / 1 repetitions\); raise its repetitions to 2",
        source_config(paths, **steps | {"sources.small.repetitions": 1}),
        workdir,
    )
    unique = {"sources.small.repetitions": 0, "sources.small.unique_tokens": small + 1}
    fail_with(
        rf"needs {small + 1:,} unique tokens \(its unique_tokens\); lower them to {small:,} or less",
        source_config(paths, **steps | unique),
        workdir,
    )
    fail_with("unique_tokens=.* must not exceed the 768 tokens", source_config(paths, **unique), workdir)
    fail_with(
        "repetitions=25 must not exceed the 24 sequences",
        source_config(paths, **{"sources.small.repetitions": 25}),
        workdir,
    )
    tiny = {"sources.small.share": 1e-6, "sources.large.share": 1 - 1e-6}
    fail_with(
        "config.sources.small.share gives the source no sequence", source_config(paths, **tiny), workdir
    )
    fail_with(
        "config.sources.small.corpus: no corpus at 'nowhere' .* correct the path",
        source_config(("nowhere", paths[1])),
        workdir,
    )
    fail_with(
        "config.sources.large.corpus=.* and config.sources.small.corpus=.* are the same corpus",
        source_config((paths[1], paths[1])),
        workdir,
    )
    build(Recipe(str(jsonl), vocab_size=640), str(tmp_path / "other"), workers=1, quiet=True)
    fail_with(
        "config.sources.small.corpus=.*other has another tokenizer than config.sources.large.corpus=.*"
        "prepare it again with --tokenizer=.*tokenizer.model",
        source_config((tmp_path / "other", paths[1])),
        workdir,
    )


def test_unique_tokens_may_be_read_a_fractional_number_of_times(paths, tmp_path):
    changes = {"sources.small.repetitions": 0, "sources.small.unique_tokens": 512.0}
    config, corpora, mesh = open_job(source_config(paths, **changes), tmp_path)
    run = _Run(config, tmp_path, corpora, mesh)
    assert run.ordered[1].order.unique == 512 and run.ordered[1].order.budget == 768


def test_sources_are_overridden_on_the_command_line(paths, tmp_path):
    small, large = paths
    shares = [
        f"--config.sources.{name}.share={share}" for name, share in (("small", 0.125), ("large", 0.875))
    ]
    process = run_command(
        "dualsm.train", "--config=tests/micro_sources.py:nowhere,nowhere", f"--workdir={tmp_path / 'run'}",
        f"--config.sources.small.corpus={small}", f"--config.sources.large.corpus={large}", *shares,
        "--config.sources.small.repetitions=0", "--config.sources.small.unique_tokens=128",
        "--config.sources.small.mixture.causal=0.25", "--config.sources.small.mixture.masked_diffusion=0.75",
        "--config.valid.objectives=", "--config.steps=4", "--config.model.num_layers=1",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    text = process.stdout + process.stderr
    assert f"data small: 128 tokens = 128 unique x 1 repetitions, from {small}" in text
    assert "small/causal 0.03125, small/masked_diffusion 0.09375" in text
    assert "small epoch 1.00" in text
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["sources"]["small"]["identity"] == Corpus(str(small)).identity
