"""`dualsm.sweep` as a user runs it: real cells, one of which fails and one of which diverges."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dualsm.evaluation.spec import OBJECTIVES, EvalSpec
from dualsm.process.errors import UserError
from dualsm.rundir.metrics import read_metrics
from dualsm.sweeps.grid import Cell, make_cells
from dualsm.sweeps.jobs import run_missing
from dualsm.sweeps.sweep_folder import Sweep, _divergence
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
    "--cell=batch_size=100000,alpha=1",
    "--cell=optimizer.learning_rate=1e30,max_consecutive_skips=3,alpha=1",
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
    failed = status(sweep, "batch_size=100000,alpha=1")
    assert failed["status"] == "failed"
    assert "tokens" in failed["reason"]
    diverged = status(sweep, "optimizer.learning_rate=1e+30,max_consecutive_skips=3,alpha=1")
    assert diverged["status"] == "diverged"
    assert "steps 2 to 4" in diverged["reason"]
    lost = status(sweep, "optimizer.learning_rate=1000000,alpha=1")
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
    monkeypatch.setattr("dualsm.sweeps.jobs._Job", lambda sweep, cell, *_: started.append(cell.name))
    cells = [
        Cell(name, values) for name, values in json.loads((sweep / "sweep.json").read_text())["cells"].items()
    ]
    again = Sweep(sweep, "micro.py", {}, micro_config(corpus_path), cells)
    with pytest.raises(AttributeError):  # the job that stands in for the first is none
        run_missing(again, jobs=1)
    assert started == ["batch_size=100000,alpha=1"]


def test_a_cluster_gets_one_task_a_cell(recipe, tmp_path):
    """That SLURM runs them is tested in `tests/launch/test_slurm.py`."""
    command = arguments(recipe, tmp_path / "other", *GRID, "--launch=slurm")
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    assert "--array=0-3 " in done.stdout
    script = done.stdout.replace("bash launch/slurm.sbatch", "bash launch/slurm.sbatch --dry-run")
    env = {"SLURM_ARRAY_TASK_ID": "3", "PATH": os.environ["PATH"]}
    task = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=env, cwd=ROOT)
    assert "dualsm.train --stopped_status=75" in task.stdout
    assert "--config.repetitions=4" in task.stdout
    assert "--config.mixture.causal=0.5" in task.stdout
    assert not (tmp_path / "other").exists()
    limited = run_command(*command, "--jobs=2")
    assert "--array=0-3%2 " in limited.stdout


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
        (("--grid=alpha=0", "--grid=alpha=1"), "--grid: 'alpha' is given 2 times"),
        (("--grid=repetitoins=1,2",), "unknown config key 'repetitoins'"),
        (("--grid=alpha=2",), "cell alpha=2: config.mixture.causal=2 must be in [0, 1]"),
        (("--grid=alpha=0,l/8",), "cell alpha=l%2F8: grid value alpha='l/8' is no number"),
        (("--grid=repetitions=1,4,",), "does not read"),
        (("--tasks=blimp",), "needs --task_data"),
        (("--tasks=valid", "--modes="), "--modes= must name"),
        (("--config.data.path=nowhere",), "no corpus at 'nowhere'"),
        (("--cell=data.path=nowhere",), "no corpus at 'nowhere'"),
    ],
)
def test_impossible_grids_are_refused_in_one_line(recipe, tmp_path, more, message):
    done = run_command(*arguments(recipe, tmp_path / "sweep", *more))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


def test_keys_that_end_alike_are_two_cells_and_one_config_is_one_cell(corpus_path, tmp_path, capsys):
    weights = [{"objectives.causal.weight": 2}, {"objectives.masked_diffusion.weight": 2}]
    as_default = {"objectives.causal.weight": 2.0, "optimizer.beta1": micro_config().optimizer.beta1}
    cells = make_cells({}, more=[*weights, as_default])
    sweep = Sweep(tmp_path, "micro.py", {}, micro_config(corpus_path), cells)
    assert [cell.name for cell in sweep.cells] == [
        "objectives.causal.weight=2", "objectives.masked_diffusion.weight=2",
    ]  # fmt: skip
    assert f"cell {cells[2].name} has the same config as cell {cells[0].name}" in capsys.readouterr().err


def test_another_recipe_is_refused(recipe, sweep):
    done = run_command(*arguments(recipe, sweep, *GRID, "--config.seed=1"))
    assert done.returncode == 2
    assert "holds a sweep of" in done.stderr


@pytest.fixture
def one_cell(sweep, corpus_path, tmp_path):
    """A function that makes a sweep of one finished cell, to be evaluated on what is asked for."""
    (cell,) = make_cells({"repetitions": [1], "alpha": [0]})
    shutil.copytree(sweep / "cells" / cell.name, tmp_path / "cells" / cell.name)

    def make(asked: EvalSpec | None = None, **values) -> tuple[Sweep, Cell]:
        changed = Cell(cell.name, cell.values | values)
        return Sweep(tmp_path, "micro.py", {}, micro_config(corpus_path), [changed], asked), changed

    return make


def test_cells_of_another_config_are_refused_before_anything_is_written(recipe, sweep):
    plan = (sweep / "sweep.json").read_bytes()
    rule = "--rule=repetitions=4: optimizer.learning_rate=0.005"
    done = run_command(*arguments(recipe, sweep, *GRID, rule))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    for text in (f"cell {NAMES[2]}", "(optimizer.learning_rate: ", " -> 0.005)", "delete that folder"):
        assert text in done.stderr
    assert (sweep / "sweep.json").read_bytes() == plan


def test_a_cell_may_change_in_what_does_not_change_the_run(one_cell):
    one_cell()[0].check()
    one_cell(gradient_accumulation_steps=2)[0].check()
    with pytest.raises(UserError, match=r"steps: 12 -> 24"):
        one_cell(steps=24)[0].check()


def test_only_what_was_not_measured_as_asked_is_evaluated(one_cell):
    asked = EvalSpec(["blimp", "piqa", "valid"], ["causal", "masked"], "eval", limit=5)
    sweep, cell = one_cell(asked)

    def measured(step=12, limit=5, tasks=asked.tasks[:2], modes=asked.modes, held_out=OBJECTIVES):
        folder = sweep.path(cell) / "eval"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tasks = {task: {mode: {"limit": limit} for mode in modes} for task in tasks}
        results = {"tasks": tasks, "held_out": {OBJECTIVES[mode]: {} for mode in held_out}}
        (folder / f"step_{step}.json").write_text(json.dumps(results))
        return [command[1] for command in sweep.remaining(cell)]

    assert measured() == []
    for lacking in (
        {"step": 8}, {"limit": 0}, {"tasks": ["blimp"]}, {"modes": ["causal"]}, {"held_out": ["causal"]},
    ):  # fmt: skip
        assert measured(**lacking) == ["dualsm.evaluate"], lacking
    shutil.rmtree(sweep.path(cell) / "checkpoints")
    assert measured(limit=0) == ["dualsm.train", "dualsm.evaluate"]


def test_a_finished_cell_is_evaluated_on_more(one_cell):
    sweep, cell = one_cell(EvalSpec(["valid"], ["causal"]))
    (sweep.path(cell) / "cell.json").write_text(json.dumps({"status": "done", "seconds": 1000}))
    assert run_missing(sweep, jobs=1)[cell.name]["status"] == "done"
    results = json.loads((sweep.path(cell) / "eval" / "step_12.json").read_text())
    assert list(results["held_out"]) == ["causal"]
    assert json.loads((sweep.path(cell) / "cell.json").read_text())["seconds"] > 1000  # training is in it
    assert "training" not in (sweep.folder / "logs" / f"{cell.name}.log").read_text()
    assert run_missing(sweep, jobs=1) == {}


def test_log_lines_are_read_again_only_when_the_file_has_changed(one_cell, monkeypatch):
    """The function that reads a file is replaced by one that counts its calls and does the same."""
    sweep, cell = one_cell()
    reads = []

    def counted(path):
        reads.append(path)
        return read_metrics(path)

    monkeypatch.setattr("dualsm.sweeps.sweep_folder.read_metrics", counted)
    shown = [sweep.row(cell) for _ in range(5)]
    assert len(reads) == 1
    assert all(row == shown[0] for row in shown)
    assert shown[0][2] == "12/12"
    all_records = read_metrics(sweep.path(cell))
    assert _divergence(sweep.records(cell)) == _divergence(all_records)
    with (sweep.path(cell) / "metrics.jsonl").open("a") as file:
        for step, name in ((13, "valid/masked_diffusion/loss"), (14, "train/loss"), (15, "train/loss")):
            file.write(json.dumps({"step": step, name: float(step)}) + "\n")
    row = sweep.row(cell)
    assert len(reads) == 2
    assert row[2] == "15/12"
    assert "13.000" in row
    assert [record["step"] for record in sweep.records(cell)] == [0, 13, 15]


def test_a_damaged_record_is_made_anew(one_cell):
    sweep, cell = one_cell()
    record = sweep.path(cell) / "cell.json"
    for content in ('{"status": "do', "[1]", '{"status": "dreaming"}'):
        record.write_text(content)
        assert run_missing(sweep, jobs=1) == {}
        assert json.loads(record.read_text())["status"] == "done"


@pytest.mark.parametrize("content", ["", "[]", '{"cells": 3}', '{"cells": {}}'])
def test_the_folder_of_something_else_is_refused(one_cell, content):
    sweep, _ = one_cell()
    (sweep.folder / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"no file of dualsm.sweep|holds a sweep of None"):
        sweep.check()


def test_a_sweep_of_failures_fails(recipe, tmp_path):
    folder = tmp_path / "sweep"
    done = run_command(*arguments(recipe, folder, "--grid=batch_size=100000", "--grid=alpha=0,1"))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: all 2 cells that ran failed; batch_size=100000,alpha=0: ")
    assert status(folder, "batch_size=100000,alpha=0")["reason"].removeprefix("error: ") in done.stderr
    assert (folder / "table.csv").exists()


def test_a_terminals_interrupt_costs_no_steps(recipe, tmp_path):
    """Ctrl-C reaches all processes of a terminal's foreground; the cell's must still hear of it once."""
    folder = tmp_path / "sweep"
    long = ("--config.steps=20000", "--config.checkpoint.every=20000", "--config.valid.every=20000")
    command = arguments(recipe, folder, *long, "--grid=repetitions=200", "--grid=alpha=1")
    # Tests that a script runs in the background ignore SIGINT; processes inherit that, but no handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT, env=command_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    cell, deadline = folder / "cells" / "repetitions=200,alpha=1", time.monotonic() + 120
    while len(read_metrics(cell)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    log = (folder / "logs" / f"{cell.name}.log").read_text()
    assert log.count("finishing the step and saving") == 1
    (step,) = [int(path.name) for path in (cell / "checkpoints").iterdir() if path.name.isdigit()]
    assert read_metrics(cell)[-1]["step"] <= step < 20000
