"""Job lists of a sweep, and the evaluation of cells that were trained elsewhere."""

import json
import os
import shlex
import shutil
import subprocess

import pytest
from etils import epath

from dualsm.evaluation.spec import EvalSpec
from dualsm.process.cli import find_configs
from dualsm.process.errors import UserError
from dualsm.rundir.workdir import read_config
from dualsm.sweeps.cluster import job_list
from dualsm.sweeps.grid import make_cells
from dualsm.sweeps.jobs import run_missing
from dualsm.sweeps.sweep_folder import Sweep
from tests.conftest import ROOT, run_command
from tests.micro import micro_config
from tests.micro_sources import two_sources

CLOUD = {"PROJECT": "p", "ZONE": "us-west4-a", "BUCKET": "b", "TYPE": "v5litepod-16", "RUNTIME": "image"}
VALID = EvalSpec(["valid"], ["causal"])


def make_sweep(folder, config, axes, spec=None) -> Sweep:
    return Sweep(epath.Path(folder), "micro.py", {}, config, make_cells(axes), spec)


def data_flags(sweep: Sweep) -> list[str]:
    """Returns the flags `--data` of the evaluation of the first cell."""
    _, evaluate = sweep.commands(sweep.cells[0])
    return [flag for flag in evaluate if flag.startswith("--data=")]


def run_list(text: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs a list for TPUs; the script prints its commands."""
    script = text.replace("launch/tpu_vm.sh train", "launch/tpu_vm.sh --dry-run train")
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]} | CLOUD | variables
    return subprocess.run(["bash"], input=script, text=True, capture_output=True, env=env, cwd=ROOT)


def test_held_out_text_is_read_from_the_corpora_of_this_machine(tmp_path):
    axes = {"repetitions": [1]}
    for path in ("corpora/a", "corpora/a,b=c", "~/corpora", "gs://b/corpus"):
        assert data_flags(make_sweep(tmp_path, micro_config(path), axes, VALID)) == [f"--data={path}"]
    tasks = EvalSpec(["blimp"], ["causal"], "eval")
    assert data_flags(make_sweep(tmp_path, micro_config("corpus"), axes, tasks)) == []
    moved = make_sweep(tmp_path, micro_config("corpus"), {"data.path": ["moved"]}, VALID)
    assert data_flags(moved) == ["--data=moved"]
    axes = {"steps": [12]}
    sweep = make_sweep(tmp_path, two_sources("corpora/a=b", "gs://b/large"), axes, VALID)
    assert data_flags(sweep) == ["--data=large=gs://b/large,small=corpora/a=b"]
    # `--data` cannot express this path; the evaluation uses the config of the run.
    assert data_flags(make_sweep(tmp_path, two_sources("a,b", "large"), axes, VALID)) == []


def test_all_cells_on_tpus_have_the_same_corpus(tmp_path):
    text = job_list(make_sweep(tmp_path / "s", micro_config("corpora/x"), {"repetitions": [1, 4]}), "tpu")
    assert "PROJECT, ZONE, BUCKET, TYPE and RUNTIME" in text and "and CORPUS" in text
    done = run_list(text, CORPUS="corpora/hplt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gs://b/corpora/hplt") == 2
    assert "corpora/s-" not in done.stdout
    assert [f"runs/s-{i}" in done.stdout for i in range(3)] == [True, True, False]
    unset = run_list(text)
    assert unset.returncode != 0 and not unset.stdout
    assert "CORPUS: export the path of the corpus in the bucket" in unset.stderr


def test_several_corpora_on_tpus_are_read_from_the_bucket(tmp_path):
    for config, axes in (
        (two_sources("gs://b/small", "gs://b/large"), {"steps": [12]}),
        (micro_config(), {"data.path": ["gs://b/small", "gs://b/large"]}),
        (micro_config("gs://b/small"), {"steps": [12]}),
    ):
        done = run_list(job_list(make_sweep(tmp_path, config, axes), "tpu"), CORPUS="corpora/hplt")
        assert done.returncode == 0, done.stderr
        assert "rsync" not in done.stdout and "../corpus" not in done.stdout
    for config, axes in (
        (two_sources("gs://b/small", "corpora/large"), {"steps": [12]}),
        (micro_config(), {"data.path": ["gs://b/small", "corpora/large"]}),
    ):
        sweep = make_sweep(tmp_path, config, axes)
        with pytest.raises(UserError, match="--launch=tpu: a slice cannot read the corpus 'corpora/large'"):
            job_list(sweep, "tpu")


@pytest.mark.slow
def test_cells_that_were_trained_on_another_machine_are_evaluated(corpus_path, tmp_path):
    """`launch/tpu_vm.sh` trains with a path on the slice, which the config of the run then contains."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(corpus_path, elsewhere)
    sweep = make_sweep(tmp_path / "sweep", micro_config(corpus_path), {"repetitions": [1]}, VALID)
    (cell,) = sweep.cells
    done = run_command(
        "dualsm.train", f"--config=tests/micro.py:{elsewhere}", f"--workdir={sweep.path(cell)}"
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(elsewhere)
    sweep.check()
    outcomes = run_missing(sweep, jobs=1)
    assert outcomes[cell.name]["status"] == "done", outcomes
    assert read_config(sweep.path(cell)).data.path == str(elsewhere)
    results = json.loads((sweep.path(cell) / "eval" / "step_12.json").read_text())
    assert results["held_out"]["causal"]["settings"]["data"] == str(corpus_path)


def test_a_missing_corpus_of_held_out_text_is_named_by_its_config_key(tmp_path):
    """`dualsm sweep` has no flag `--data`."""
    sweep = make_sweep(tmp_path, micro_config("nowhere"), {"repetitions": [1]}, VALID)
    (cell,) = sweep.cells
    (sweep.path(cell) / "checkpoints" / "12").mkdir(parents=True)
    (sweep.path(cell) / "metrics.jsonl").write_text(json.dumps({"step": 12, "train/loss": 2.0}) + "\n")
    assert [shlex.join(command).split()[1] for command in sweep.remaining(cell)] == ["dualsm.evaluate"]
    with pytest.raises(UserError, match="config.data.path: no corpus at 'nowhere'"):
        sweep.check()


def test_configs_of_dualsm_have_no_path_of_this_machine_in_a_list_for_tpus(tmp_path):
    (argument,) = find_configs(["--config=dualsm:tiny:alpha=0.5"])
    recipe = argument.removeprefix("--config=")
    assert os.path.isabs(recipe)
    sweep = Sweep(epath.Path(tmp_path), recipe, {}, micro_config("x"), make_cells({"steps": [12]}), None)
    text = job_list(sweep, "tpu")
    assert "train --config=dualsm:tiny:alpha=0.5 " in text and recipe not in text
