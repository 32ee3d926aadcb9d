"""Held-out losses of benchmarks/masked_fractions.py, from the command line."""

import json

import numpy as np
import pytest

from dualsm.evaluation.held_out import evaluate_held_out, open_held_out
from dualsm.rundir.trained_run import open_run
from dualsm.training.loop import train
from tests.conftest import run_command
from tests.micro import micro_config
from tests.test_commands import assert_one_line

pytestmark = pytest.mark.slow

FRACTION, SAMPLES = 0.25, 2


@pytest.fixture(scope="module")
def workdir(corpus_path, tmp_path_factory):
    config = micro_config(corpus_path)
    config.steps, config.mesh.data, config.valid.objectives = 1, -1, ""
    path = tmp_path_factory.mktemp("masked_fractions") / "run"
    assert train(config, path)
    return path


@pytest.fixture(scope="module")
def losses(workdir, corpus_path):
    """Returns the losses that the command writes."""
    path = workdir.parent / "losses.json"
    process = run_command(
        "benchmarks/masked_fractions.py", f"--workdir={workdir}", f"--data={corpus_path}", f"--output={path}",
        f"--fractions={FRACTION}", f"--samples={SAMPLES}", "--seq_len=32", devices=2,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return json.loads(path.read_text())["losses"]


def test_causal_loss_equals_that_of_evaluate(workdir, losses):
    run = open_run(workdir)
    ((_, result),) = evaluate_held_out(run, open_held_out(run), ["causal"], samples=1)
    assert losses["causal"]["nats_per_token"] == pytest.approx(result["nats_per_token"], rel=1e-5)
    assert len(losses["causal"]["nll"]) == result["n"]


def test_every_draw_masks_the_fraction_of_each_sequence(losses):
    masked_V, maskable_V = (np.array(losses[name]["tokens"]) for name in (f"masked at {FRACTION}", "causal"))
    assert (np.abs(masked_V - SAMPLES * FRACTION * maskable_V) <= SAMPLES).all()


def test_loss_and_standard_error_agree_with_resampled_sequences(losses):
    rng = np.random.default_rng(0)
    for loss in losses.values():
        nll_V, tokens_V = np.array(loss["nll"]), np.array(loss["tokens"])
        assert loss["nats_per_token"] == pytest.approx(nll_V.sum() / tokens_V.sum(), rel=1e-4)
        choices_BxV = rng.integers(len(nll_V), size=(2000, len(nll_V)))
        resampled_B = nll_V[choices_BxV].sum(1) / tokens_V[choices_BxV].sum(1)
        assert loss["stderr"] == pytest.approx(resampled_B.std(), rel=0.1)


def test_invalid_fraction_is_rejected(workdir, corpus_path):
    process = run_command(
        "benchmarks/masked_fractions.py", f"--workdir={workdir}", f"--data={corpus_path}", "--fractions=1.5"
    )
    assert_one_line(process, "--fractions=1.5")
