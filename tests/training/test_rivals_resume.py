"""A run with everything that competes with mixtures resumes bit for bit."""

import jax
import numpy as np
import pytest

from dualsm.model.flops import train_flops
from dualsm.rundir.metrics import read_metrics
from dualsm.rundir.workdir import read_config
from dualsm.training.loop import train
from tests.micro import micro_config

from .test_resume import params_of


def rival_config(corpus_path):
    """A micro run of MIR pairs and causal rows."""
    config = micro_config(corpus_path)
    config.mixture.causal, config.mixture.prefix, config.mixture.masked_diffusion = 0.25, 0.0, 0.0
    config.mixture.mir = 0.75
    config.model.num_layers, config.model.dropout = 1, 0.1
    config.valid.objectives, config.mesh.data = "", 8
    return config


@pytest.fixture(scope="module")
def whole(corpus_path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rivals") / "whole"
    assert train(rival_config(corpus_path), workdir)
    return workdir


def test_a_stopped_run_ends_with_the_same_weights(whole, corpus_path, tmp_path):
    workdir = tmp_path / "stopped"
    assert not train(rival_config(corpus_path), workdir, stop=lambda step: step == 5)
    assert train(rival_config(corpus_path), workdir)
    jax.tree.map(np.testing.assert_array_equal, params_of(whole), params_of(workdir))


def test_tokens_of_a_pair_count_once_and_flops_twice(whole):
    lines = {line["step"]: line for line in read_metrics(whole)}
    assert lines[12]["tokens"] == 12 * (3 + 2) * 32  # of 8 rows: 3 pairs and 2 causal rows
    assert lines[12]["epoch"] == pytest.approx(1)
    assert lines[12]["flops"] == pytest.approx(6 * lines[2]["flops"])
    config = read_config(whole)
    assert lines[12]["flops"] == pytest.approx(12 * 8 * train_flops(config.model, 32, 33 / 64))
    assert lines[12]["train/mir/masked_input_causal/loss"] != lines[12]["train/mir/causal/loss"]
