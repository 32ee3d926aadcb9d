"""Commands with averaged weights: `--parameters=ema`, and the mean of checkpoints."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dualsm.config import freeze
from dualsm.evaluation import harness
from dualsm.evaluation.held_out import evaluate_held_out, open_held_out
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Item, Scorer
from dualsm.exchange import average_checkpoints, export_huggingface, export_reference
from dualsm.generation.diffusion import UnmaskingParams
from dualsm.generation.generate import generate
from dualsm.generation.prompt_batches import prompt_keys
from dualsm.generation.prompts import encode_prompt
from dualsm.generation.sampling_params import SamplingParams
from dualsm.generation.speculative import SpeculationParams
from dualsm.process.errors import UserError
from dualsm.rundir.milestones import read_milestones
from dualsm.rundir.trained_run import open_run
from dualsm.training.loop import train
from tests.commands import call_command
from tests.micro import micro_config

pytestmark = pytest.mark.slow

PROMPT = "def main("


@pytest.fixture(scope="module")
def workdir(corpus_path, tmp_path_factory):
    """A run with milestones at steps 5 and 12, whose moving average is far from the last weights."""
    config = micro_config(corpus_path)
    config.mixture.update(causal=1.0, prefix=0.0, masked_diffusion=0.0)
    config.model.num_layers, config.model.head = 1, "projected"
    config.mesh.data, config.valid.objectives = -1, ""
    config.ema.decay, config.ema.start, config.checkpoint.max_to_keep = 0.95, 1, 9
    split = json.loads((corpus_path / "manifest.json").read_text())["splits"]["train"]
    per_step = config.batch_size * config.seq_len * split["words"] / split["tokens"]
    config.checkpoint.at_words = f"{int(4.5 * per_step)},{int(11.5 * per_step)}"
    path = tmp_path_factory.mktemp("averaged") / "run"
    assert train(config, path)
    return path


@pytest.fixture(scope="module")
def runs(workdir):
    """The run with each kind of parameters."""
    return {parameters: open_run(workdir, parameters=parameters) for parameters in ("last", "ema")}


def test_evaluate_scores_the_average(workdir, runs):
    call_command(
        "evaluate", f"--workdir={workdir}", "--modes=causal", "--valid_samples=1", "--draft=0",
        "--parameters=ema",
    )  # fmt: skip
    results = json.loads((workdir / "eval" / "ema" / "step_12.json").read_text())
    assert not (workdir / "eval" / "step_12.json").exists()
    assert results["parameters"] == "ema"
    losses = {
        name: dict(evaluate_held_out(run, open_held_out(run), ["causal"], 1))["causal"]["nats_per_token"]
        for name, run in runs.items()
    }
    assert results["held_out"]["causal"]["nats_per_token"] == pytest.approx(losses["ema"], rel=1e-6)
    assert abs(losses["ema"] - losses["last"]) > 0.1


def generated(run) -> list[int]:
    prompts = [encode_prompt(run.tokenizer, PROMPT)]
    *_, (tokens,) = generate(
        run, prompts, "causal", 24, SamplingParams(0.8, 0, 0.95), UnmaskingParams(),
        prompt_keys(0, prompts), SpeculationParams(0),
    )  # fmt: skip
    return list(tokens)


def test_sample_generates_with_the_average(workdir, runs, tmp_path):
    output = tmp_path / "texts.jsonl"
    call_command(
        "sample", f"--workdir={workdir}", f"--prompt={PROMPT}", "--tokens=24", f"--output={output}",
        "--parameters=ema",
    )  # fmt: skip
    tokens = json.loads(output.read_text())["tokens"]
    assert tokens == generated(runs["ema"])
    assert tokens != generated(runs["last"])


def have_equal_weights(one, other) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize("form", ["huggingface", "reference"])
def test_export_writes_the_average(workdir, runs, tmp_path, form):
    call_command(
        "convert", "export", f"--format={form}", f"--workdir={workdir}", f"--output={tmp_path / 'command'}",
        "--parameters=ema",
    )  # fmt: skip
    export = {"huggingface": export_huggingface, "reference": export_reference}[form].export
    for parameters, run in runs.items():
        export(run, tmp_path / parameters)
    assert have_equal_weights(tmp_path / "command", tmp_path / "ema")
    assert not have_equal_weights(tmp_path / "command", tmp_path / "last")


def test_export_of_milestones_writes_the_average_at_each_of_them(workdir, tmp_path):
    call_command(
        "convert", "export", "--format=huggingface", f"--workdir={workdir}", "--milestones",
        f"--output={tmp_path / 'all'}", "--parameters=ema",
    )  # fmt: skip
    milestones = read_milestones(workdir)
    assert list(milestones) == [5, 12]
    for step, name in milestones.items():
        for parameters in ("ema", "last"):
            alone = tmp_path / f"{step} {parameters}"
            export_huggingface.export(open_run(workdir, step, parameters), alone)
            assert have_equal_weights(tmp_path / "all" / f"chck_{name}", alone) == (parameters == "ema")


def log_likelihood(run) -> float:
    scorer = Scorer(freeze(run.config.model), run.params, run.tokenizer, run.mesh)
    scoring = ScoringParams("causal", max_length=run.config.seq_len)
    return scorer([Item(PROMPT, "self):")], scoring, quiet=True).log_likelihood_N[0]


@pytest.mark.parametrize(
    "registered", [False, pytest.param(True, marks=pytest.mark.extras)], ids=["model", "registered"]
)
def test_the_harness_scores_the_average(workdir, runs, registered):
    if registered:
        pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra eval)")
        text = f"workdir={workdir},mode=causal,parameters=ema"
        model = harness.register().create_from_arg_string(text)
    else:
        model = harness.HarnessModel(str(workdir), parameters="ema")
    ((score, _),) = model.loglikelihood([Request((PROMPT, "self):"))], disable_tqdm=True)
    assert score == pytest.approx(log_likelihood(runs["ema"]), abs=1e-3)
    assert abs(score - log_likelihood(runs["last"])) > 0.1
    assert model.get_model_info()["parameters"] == "ema"


class Request:
    """A request with the attributes of the harness's requests that the adapter reads."""

    task_name, doc_id = "task", 0

    def __init__(self, args):
        self.args = args


def test_average_takes_a_list_of_checkpoints(workdir, tmp_path):
    """The checkpoints are those of steps 4, 5, 8 and 12."""
    call_command(
        "convert", "average", f"--workdir={workdir}", "--checkpoints=12,4", f"--output={tmp_path / 'mean'}"
    )
    average_checkpoints.write(workdir, [4, 12], 0, tmp_path / "expected")
    found, expected = (jax.device_get(open_run(tmp_path / name).params) for name in ("mean", "expected"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for flags, message in (
        (["--checkpoints=4,x"], "--checkpoints=4,x must be steps, such as 100,200"),
        (["--checkpoints=4,6"], "no checkpoint of step 6"),
        (["--checkpoints=4", "--last=2"], "either --checkpoints=STEP,STEP,... or --last=N"),
        ([], "either --checkpoints=STEP,STEP,... or --last=N"),
    ):
        with pytest.raises(UserError, match=message):
            call_command("convert", "average", f"--workdir={workdir}", f"--output={tmp_path / 'new'}", *flags)
    assert not (tmp_path / "new").exists()
