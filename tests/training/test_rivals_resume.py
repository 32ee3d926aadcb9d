"""A run with everything that competes with mixtures: it resumes bit for bit, and its averages can be used."""

import jax
import numpy as np
import pytest

from dualsm.exchange import average_checkpoints
from dualsm.model.flops import train_flops
from dualsm.process.errors import UserError
from dualsm.rundir.metrics import read_metrics
from dualsm.rundir.trained_run import open_run
from dualsm.rundir.workdir import read_config
from dualsm.sweeps.cells import read_curve
from dualsm.training.loop import train
from tests.micro import micro_config

pytestmark = pytest.mark.slow


def rival_config(corpus_path):
    """A micro run of MIR pairs and causal rows, whose shares change linearly, with gradient accumulation,
    dropout, its own weight decay and averaged weights."""
    config = micro_config(corpus_path)
    config.mixture.causal, config.mixture.prefix, config.mixture.masked_diffusion = 0.25, 0.0, 0.0
    config.mixture.mir = 0.75
    config.mixture_schedule.name, config.mixture_schedule.path = "linear", "1 causal=0.75 mir=0.25"
    config.batch_size, config.gradient_accumulation_steps = 16, 2
    config.model.num_layers, config.model.dropout = 1, 0.1
    config.optimizer.weight_decay_schedule.name = "linear"
    config.ema.decay, config.ema.start = 0.5, 2
    config.valid.objectives, config.valid.parameters, config.mesh.data = "causal", "both", 8
    config.checkpoint.max_to_keep = 3
    return config


@pytest.fixture(scope="module")
def whole(corpus_path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rivals") / "whole"
    assert train(rival_config(corpus_path), workdir)
    return workdir


@pytest.mark.parametrize("parameters", ["last", "ema"])
def test_a_stopped_run_ends_with_the_same_weights(whole, stopped, parameters):
    a, b = (open_run(workdir, parameters=parameters).params for workdir in (whole, stopped))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def stopped(corpus_path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rivals") / "stopped"
    assert not train(rival_config(corpus_path), workdir, stop=lambda step: step == 5)
    assert train(rival_config(corpus_path), workdir)
    return workdir


def test_tokens_of_a_pair_count_once_and_flops_twice(whole):
    lines = {line["step"]: line for line in read_metrics(whole)}
    assert lines[12]["tokens"] == 12 * (4 + 8) * 32  # of 16 rows on average: 4 pairs and 8 causal rows
    assert lines[12]["epoch"] == pytest.approx(1)
    config = read_config(whole)
    assert lines[12]["flops"] == pytest.approx(12 * 16 * train_flops(config.model, 32, 33 / 64))
    assert lines[12]["train/mir/masked_input_causal/loss"] != lines[12]["train/mir/causal/loss"]


def test_curves_are_over_tokens_or_flops(whole):
    tokens, losses = read_curve(whole, "valid/causal/loss")
    flops, same = read_curve(whole, "valid/causal/loss", "flops")
    assert losses == same and len(losses) == 3
    assert flops[2] / flops[1] == 2
    assert tokens[1:] == [(30 + 36) * 32, (48 + 96) * 32]  # of the pairs and of the causal rows


def test_both_the_weights_and_their_average_are_validated(whole):
    last = read_metrics(whole)[-1]
    assert last["valid/causal/loss"] != last["valid/ema/causal/loss"]
    assert last["valid/ema/causal/bits_per_byte"] > 0


@pytest.mark.slow
def test_only_the_average_is_validated(corpus_path, tmp_path):
    config = rival_config(corpus_path)
    config.valid.parameters, config.model.dropout, config.steps = "ema", 0.0, 6
    assert train(config, tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert "valid/ema/causal/loss" in last and "valid/causal/loss" not in last


def test_the_mean_of_checkpoints_is_exact(whole, tmp_path):
    average_checkpoints.write(whole, [4, 12], 0, tmp_path / "two")
    average_checkpoints.write(whole, [], 3, tmp_path / "three")
    by_step = {step: jax.device_get(open_run(whole, step).params) for step in (4, 8, 12)}
    for name, steps in (("two", (4, 12)), ("three", (4, 8, 12))):
        run = open_run(tmp_path / name)
        jax.tree.map(
            lambda found, *parts: np.testing.assert_array_equal(
                found, np.mean(np.stack(parts).astype(np.float64), 0).astype(np.float32)
            ),
            jax.device_get(run.params),
            *(by_step[step] for step in steps),
        )
        assert run.step == 0 and run.tokenizer.sha256() == open_run(whole).tokenizer.sha256()


def test_a_fork_continues_the_average(whole, corpus_path, tmp_path):
    config = rival_config(corpus_path)
    config.start.run, config.start.step = str(whole), 8
    assert train(config, tmp_path / "fork")
    for parameters in ("last", "ema"):
        a, b = (open_run(workdir, parameters=parameters).params for workdir in (whole, tmp_path / "fork"))
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_missing_checkpoints_and_averages_are_named(whole, tmp_path):
    average_checkpoints.write(whole, [4], 0, tmp_path / "one")
    with pytest.raises(UserError, match="parameters=ema: step 0 .* has no moving average"):
        open_run(tmp_path / "one", parameters="ema")
    with pytest.raises(UserError, match="no checkpoint of step 5"):
        average_checkpoints.write(whole, [4, 5], 0, tmp_path / "new")
    with pytest.raises(UserError, match=r"--last=9: .* has only 3 checkpoints \(4, 8, 12\)"):
        average_checkpoints.write(whole, [], 9, tmp_path / "new")
    with pytest.raises(UserError, match="--output=.*one already exists"):
        average_checkpoints.write(whole, [4], 0, tmp_path / "one")
    assert not (tmp_path / "new").exists()
