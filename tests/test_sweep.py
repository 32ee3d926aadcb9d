"""`dualsm.sweep` as a user runs it: real cells, one of which fails and one of which diverges."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dualsm.analysis.grid import Cell
from dualsm.analysis.sweep import Sweep, _divergence, run_missing
from dualsm.training.metrics import read_metrics
from tests.conftest import ROOT, command_env, run_command
from tests.micro import micro_config


@pytest.fixture(scope="module")
def recipe(corpus_path) -> str:
    return f"tests/micro.py:{corpus_path}"


def arguments(recipe: str, workdir: Path, *more: str) -> list[str]:
    return ["dualsm.sweep", f"--config={recipe}", f"--workdir={workdir}", *more]


GRID = ("--grid=repetitions=1,4", "--grid=alpha=0,1/2")
# Too large for the corpus; rates at which float32 overflows at once, and later than the run gives up.
BAD = (
    "--cell=batch_rows=100000,alpha=1",
    "--cell=optimizer.learning_rate=1e30,skip_limit=3,alpha=1",
    "--cell=optimizer.learning_rate=1e6,alpha=1",
)
NAMES = [f"repetitions={r},alpha={a}" for r in (1, 4) for a in ("0", "0.5")]


@pytest.fixture(scope="module")
def sweep(recipe, tmp_path_factory) -> Path:
    """A sweep that was stopped while its first cell ran, and then run to its end."""
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    command = [sys.executable, "-m", *arguments(recipe, folder, *GRID, *BAD)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=command_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not read_metrics(folder / "cells" / NAMES[0]) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (folder / "cells" / NAMES[1]).exists()
    done = run_command(*arguments(recipe, folder, *GRID, *BAD))
    assert done.returncode == 0, done.stderr
    assert "repetitions=4,alpha=0.5  done" in done.stdout
    return folder


def status(sweep: Path, cell: str) -> dict:
    return json.loads((sweep / "cells" / cell / "cell.json").read_text())


def test_every_cell_is_an_ordinary_finished_run(sweep):
    for name in NAMES:
        assert status(sweep, name)["status"] == "done"
        config = json.loads((sweep / "cells" / name / "config.json").read_text())
        assert [record["step"] for record in read_metrics(sweep / "cells" / name)][-1] == config["steps"]
        assert f"repetitions={config['repetitions']},alpha={config['mixture']['causal']:g}" == name
        assert config["mixture"]["prefix"] == 0


def test_failed_and_diverged_cells_are_recorded_and_the_sweep_goes_on(sweep):
    failed = status(sweep, "batch_rows=100000,alpha=1")
    assert failed["status"] == "failed"
    assert "tokens" in failed["reason"]
    diverged = status(sweep, "learning_rate=1e_30,skip_limit=3,alpha=1")
    assert diverged["status"] == "diverged"
    assert "steps 2 to 4" in diverged["reason"]
    lost = status(sweep, "learning_rate=1e_06,alpha=1")
    assert lost["status"] == "diverged"
    assert "the last updates were all skipped" in lost["reason"]


@pytest.mark.parametrize(("loss", "diverged"), [(5.0, False), (13.0, True), (250_000.0, True)])
def test_a_loss_far_above_the_untrained_models_is_a_divergence(loss, diverged):
    untrained = {"step": 0, "valid/causal/loss": 6.2, "valid/prefix/loss": 6.3}
    learned = {"step": 2, "train/loss": 4.0}
    overfitted = {"step": 4, "train/loss": loss, "valid/causal/loss": 15.0}
    assert bool(_divergence([untrained, learned, overfitted])) == diverged


def test_the_report_has_every_cell(sweep):
    with (sweep / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert sorted(row["status"] for row in rows) == ["diverged", "diverged", *["done"] * 4, "failed"]


def test_the_same_sweep_again_runs_only_what_failed(sweep, corpus_path, monkeypatch):
    started = []
    monkeypatch.setattr("dualsm.analysis.sweep._Job", lambda sweep, cell, *_: started.append(cell.name))
    cells = [
        Cell(name, values) for name, values in json.loads((sweep / "sweep.json").read_text())["cells"].items()
    ]
    again = Sweep(sweep, "micro.py", {}, micro_config(corpus_path), cells)
    with pytest.raises(AttributeError):  # the job that stands in for the first is none
        run_missing(again, jobs=1)
    assert started == ["batch_rows=100000,alpha=1"]


def test_a_cluster_gets_one_task_a_cell(recipe, sweep, tmp_path):
    done = run_command(*arguments(recipe, tmp_path / "other", *GRID, "--launch=slurm"))
    assert done.returncode == 0, done.stderr
    assert "--array=0-3" in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    # A task run by hand does one cell; `srun` stands for itself here.
    script = done.stdout.replace("exec srun bash", "exec echo")
    task = subprocess.run(
        ["bash"], input=script, text=True, capture_output=True, env={"SLURM_ARRAY_TASK_ID": "3"}
    )
    assert task.stdout.startswith("-c python -m dualsm.train")
    assert "--config.repetitions=4" in task.stdout
    assert "--config.mixture.causal=0.5" in task.stdout
    assert not (tmp_path / "other").exists()


def test_a_tpu_slice_is_asked_for_each_cell(recipe, tmp_path):
    done = run_command(*arguments(recipe, tmp_path / "other", *GRID, "--launch=tpu"))
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    starts = [line for line in done.stdout.splitlines() if line.startswith("NAME=")]
    assert [line.split()[0] for line in starts] == [f"NAME=other-{number}" for number in range(4)]
    assert all("launch/tpu_vm.sh train --config=" in line and "--workdir" not in line for line in starts)
    assert "--config.repetitions=4" in starts[3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--grid=repetitions",), "does not read"),
        (("--grid=repetitoins=1,2",), "unknown config key 'repetitoins'"),
        (("--grid=alpha=2",), "cell alpha=2: config.mixture.causal=2 must lie in [0, 1]"),
    ],
)
def test_impossible_grids_are_refused_in_one_line(recipe, tmp_path, more, message):
    done = run_command(*arguments(recipe, tmp_path / "sweep", *more))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


def test_another_recipe_is_refused(recipe, sweep):
    done = run_command(*arguments(recipe, sweep, *GRID, "--config.seed=1"))
    assert done.returncode == 2
    assert "holds a sweep of" in done.stderr
