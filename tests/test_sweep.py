"""`dualsm.sweep` with real cells, some of which fail or diverge."""

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

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(corpus_path) -> str:
    return f"tests/micro.py:{corpus_path}"


def arguments(recipe: str, workdir: Path, *more: str) -> list[str]:
    return ["dualsm.sweep", f"--config={recipe}", f"--workdir={workdir}", *more]


GRID = ("--grid=repetitions=1,4", "--grid=alpha=0,1/2")
# A batch that is too large for the corpus, and learning rates at which float32 overflows early and late.
BAD = (
    "--cell=batch_size=100000,alpha=1",
    "--cell=optimizer.learning_rate=1e30,max_consecutive_skips=3,alpha=1",
    "--cell=optimizer.learning_rate=1e6,alpha=1",
)
NAMES = [f"repetitions={r},alpha={a}" for r in (1, 4) for a in ("0", "0.5")]


@pytest.fixture(scope="module")
def sweep(recipe, tmp_path_factory) -> Path:
    """Stops a sweep during its first cell, then runs it to completion."""
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


def test_every_cell_is_a_finished_run_directory(sweep):
    for name in NAMES:
        assert status(sweep, name)["status"] == "done"
        config = json.loads((sweep / "cells" / name / "config.json").read_text())
        assert [record["step"] for record in read_metrics(sweep / "cells" / name)][-1] == config["steps"]
        assert f"repetitions={config['repetitions']},alpha={config['mixture']['causal']:g}" == name
        assert config["mixture"]["prefix"] == 0


def test_sweep_records_failed_and_diverged_cells_and_continues(sweep):
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
def test_a_loss_far_above_that_of_the_untrained_model_is_divergence(loss, diverged):
    untrained = {"step": 0, "valid/causal/loss": 6.2, "valid/prefix/loss": 6.3}
    learned = {"step": 2, "train/loss": 4.0}
    losses = {"train/loss": loss, "train/causal/loss": loss}
    overfitted = {"step": 4, **losses, "valid/causal/loss": 15.0}
    assert bool(_divergence([untrained, learned, overfitted])) == diverged


def test_the_report_lists_every_cell(sweep):
    with (sweep / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert sorted(row["status"] for row in rows) == ["diverged", "diverged", *["done"] * 4, "failed"]


def test_repeating_a_sweep_runs_only_failed_cells(sweep, corpus_path, monkeypatch):
    started = []
    monkeypatch.setattr("dualsm.sweeps.jobs._Job", lambda sweep, cell, *_: started.append(cell.name))
    cells = [
        Cell(name, values) for name, values in json.loads((sweep / "sweep.json").read_text())["cells"].items()
    ]
    again = Sweep(sweep, "micro.py", {}, micro_config(corpus_path), cells)
    with pytest.raises(AttributeError):  # the replaced job is None
        run_missing(again, jobs=1)
    assert started == ["batch_size=100000,alpha=1"]


def test_slurm_has_one_task_per_cell(recipe, tmp_path):
    """`tests/launch/test_slurm.py` runs the tasks on a real SLURM."""
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


def test_each_cell_has_a_tpu_slice(recipe, tmp_path):
    done = run_command(*arguments(recipe, tmp_path / "other", *GRID, "--launch=tpu"))
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    starts = [line for line in done.stdout.splitlines() if line.startswith("NAME=")]
    assert [line.split()[0] for line in starts] == [f"NAME=other-{number}" for number in range(4)]
    assert all("launch/tpu_vm.sh train --config=" in line and "--workdir" not in line for line in starts)
    assert "--config.repetitions=4" in starts[3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--grid=repetitions",), "is not of the form"),
        (("--grid=alpha=0", "--grid=alpha=1"), "--grid: 'alpha' is given 2 times"),
        (("--grid=repetitoins=1,2",), "unknown config key 'repetitoins'"),
        (("--grid=alpha=2",), "cell alpha=2: config.mixture.causal=2 must be in [0, 1]"),
        (("--grid=alpha=0,l/8",), "cell alpha=l%2F8: grid value alpha='l/8' is not a number"),
        (("--grid=repetitions=1,4,",), "is not of the form"),
        (("--tasks=blimp",), "needs --task_data"),
        (("--tasks=valid", "--modes="), "--modes= is empty"),
        (("--config.data.path=nowhere",), "config.data.path: no corpus at 'nowhere'"),
        (("--cell=data.path=nowhere",), "config.data.path: no corpus at 'nowhere'"),
    ],
)
def test_invalid_grids_are_one_line_errors(recipe, tmp_path, more, message):
    done = run_command(*arguments(recipe, tmp_path / "sweep", *more))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


def test_equal_configs_are_one_cell_and_equal_key_endings_are_two(corpus_path, tmp_path, capsys):
    weights = [{"objectives.causal.weight": 2}, {"objectives.masked_diffusion.weight": 2}]
    as_default = {"objectives.causal.weight": 2.0, "optimizer.beta1": micro_config().optimizer.beta1}
    cells = make_cells({}, more=[*weights, as_default])
    sweep = Sweep(tmp_path, "micro.py", {}, micro_config(corpus_path), cells)
    assert [cell.name for cell in sweep.cells] == [
        "objectives.causal.weight=2", "objectives.masked_diffusion.weight=2",
    ]  # fmt: skip
    assert f"cell {cells[2].name} has the same config as cell {cells[0].name}" in capsys.readouterr().err


def test_a_different_recipe_raises(recipe, sweep):
    done = run_command(*arguments(recipe, sweep, *GRID, "--config.seed=1"))
    assert done.returncode == 2
    assert "contains a sweep of" in done.stderr


@pytest.fixture
def one_cell(sweep, corpus_path, tmp_path):
    """Returns a function that makes a sweep of one finished cell with an evaluation spec."""
    (cell,) = make_cells({"repetitions": [1], "alpha": [0]})
    shutil.copytree(sweep / "cells" / cell.name, tmp_path / "cells" / cell.name)

    def make(spec: EvalSpec | None = None, **values) -> tuple[Sweep, Cell]:
        changed = Cell(cell.name, cell.values | values)
        return Sweep(tmp_path, "micro.py", {}, micro_config(corpus_path), [changed], spec), changed

    return make


def test_a_changed_cell_raises_before_anything_is_written(recipe, sweep):
    plan = (sweep / "sweep.json").read_bytes()
    rule = "--rule=repetitions=4: optimizer.learning_rate=0.005"
    done = run_command(*arguments(recipe, sweep, *GRID, rule))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    for text in (f"cell {NAMES[2]}", "(optimizer.learning_rate: ", " -> 0.005)", "delete that folder"):
        assert text in done.stderr
    assert (sweep / "sweep.json").read_bytes() == plan


def test_a_cell_may_change_keys_that_do_not_affect_the_run(one_cell):
    one_cell()[0].check()
    one_cell(gradient_accumulation_steps=2)[0].check()
    with pytest.raises(UserError, match=r"steps: 12 -> 24"):
        one_cell(steps=24)[0].check()


def test_only_missing_results_are_evaluated(one_cell):
    spec = EvalSpec(["blimp", "piqa", "valid"], ["causal", "masked"], "eval", limit=5)
    sweep, cell = one_cell(spec)

    def measured(step=12, limit=5, tasks=spec.tasks[:2], modes=spec.modes, held_out=OBJECTIVES):
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
    assert "--baselines=" in sweep.remaining(cell)[1]  # they take as long as the scores of the cell


def test_a_finished_cell_is_evaluated_on_new_tasks(one_cell):
    sweep, cell = one_cell(EvalSpec(["valid"], ["causal"]))
    (sweep.path(cell) / "cell.json").write_text(json.dumps({"status": "done", "seconds": 1000}))
    assert run_missing(sweep, jobs=1)[cell.name]["status"] == "done"
    results = json.loads((sweep.path(cell) / "eval" / "step_12.json").read_text())
    assert list(results["held_out"]) == ["causal"]
    assert (
        json.loads((sweep.path(cell) / "cell.json").read_text())["seconds"] > 1000
    )  # includes the training time
    assert "mixture:" not in (sweep.folder / "logs" / f"{cell.name}.log").read_text()
    assert run_missing(sweep, jobs=1) == {}


def test_metrics_are_read_again_only_after_a_change(one_cell, monkeypatch):
    """`read_metrics` is wrapped to count its calls."""
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


def test_a_damaged_record_is_rewritten(one_cell):
    sweep, cell = one_cell()
    record = sweep.path(cell) / "cell.json"
    for content in ('{"status": "do', "[1]", '{"status": "dreaming"}'):
        record.write_text(content)
        assert run_missing(sweep, jobs=1) == {}
        assert json.loads(record.read_text())["status"] == "done"


@pytest.mark.parametrize("content", ["", "[]", '{"cells": 3}', '{"cells": {}}'])
def test_a_foreign_sweep_file_raises(one_cell, content):
    sweep, _ = one_cell()
    (sweep.folder / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"not a file of dualsm.sweep|contains a sweep of None"):
        sweep.check()


def test_a_sweep_fails_if_all_cells_fail(recipe, tmp_path):
    folder = tmp_path / "sweep"
    done = run_command(*arguments(recipe, folder, "--grid=batch_size=100000", "--grid=alpha=0,1"))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: all 2 cells that ran failed; batch_size=100000,alpha=0: ")
    assert status(folder, "batch_size=100000,alpha=0")["reason"].removeprefix("error: ") in done.stderr
    assert (folder / "table.csv").exists()


def test_an_interrupt_from_a_terminal_loses_no_steps(recipe, tmp_path):
    """Ctrl-C signals all foreground processes; a cell must receive the signal only once."""
    folder = tmp_path / "sweep"
    long = ("--config.steps=20000", "--config.checkpoint.every=20000", "--config.valid.every=20000")
    command = arguments(recipe, folder, *long, "--grid=repetitions=200", "--grid=alpha=1")
    # A test run in the background ignores SIGINT, and child processes inherit this but not a handler.
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
