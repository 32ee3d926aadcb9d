"""`launch/slurm.sbatch` and the jobs of `dualsm.sweep --launch=slurm` on a real SLURM.

The scripts are submitted unchanged; only resources are given on the command line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dualsm.config import load_config
from dualsm.model.transformer import init_params
from dualsm.rundir.checkpoint_reader import restore_params
from dualsm.rundir.metrics import read_metrics
from tests.conftest import ROOT, run_command
from tests.launch import slurm as real
from tests.processes import write_recipe

pytestmark = pytest.mark.extras

SCRIPT = str(ROOT / "launch" / "slurm.sbatch")
ONE_TASK = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=60")
TWO_TASKS = ("--ntasks-per-node=2", "--gpus-per-node=2")
FINISHED = {"JobState": "COMPLETED", "ExitCode": "0:0"}


@pytest.fixture(scope="module")
def slurm():
    real.install()
    with real.Slurm() as cluster:
        yield cluster


@pytest.fixture
def submit(slurm, corpus_path, tmp_path):
    """Submits a `Job`."""
    return lambda *resources, **options: Job(slurm, corpus_path, tmp_path, resources, **options)


class Job:
    """A job of `launch/slurm.sbatch` that trains for some seconds and rarely saves unless it gets a signal.

    Several processes on a CPU are much slower per step than one, so they train for fewer steps.
    """

    def __init__(
        self, slurm, corpus: Path, folder: Path, resources: tuple[str, ...], steps: int = 2000, **env
    ):
        self.slurm, self.workdir, self.steps, self.every = slurm, folder / "run", steps, steps // 2
        recipe = write_recipe(folder / "recipe.py", corpus, steps=steps, repetitions=100)
        self.arguments = [f"--config={recipe}", f"--config.log.every={steps // 20}"]
        self.arguments += [f"--config.{name}.every={self.every}" for name in ("checkpoint", "valid")]
        command = (SCRIPT, *self.arguments, f"--workdir={self.workdir}")
        env = {"PYTHON": sys.executable} | env
        self.id = slurm.submit(*ONE_TASK, *resources, *command, cwd=folder, **env)
        self.log = folder / f"dualsm-{self.id}.log"

    def wait_for_steps(self) -> None:
        """Waits until the run has logged some steps."""
        self.slurm.wait_for(lambda: len(read_metrics(self.workdir)) >= 2, "steps are logged", self.id)

    def wait_until(self, **expected: str) -> dict[str, str]:
        return self.slurm.wait_until(self.id, **expected)

    def stop(self, *options: str) -> None:
        self.slurm.run("scancel", "--signal=TERM", *options, self.id)

    def check_finished(self) -> None:
        """Waits for the end of a run that was stopped once and resumed from the last save."""
        self.wait_until(**FINISHED, Restarts="1")
        self.check_logged()
        (start,) = self.resumed_at()
        assert start % self.every

    def check_logged(self) -> None:
        """Checks that every step was logged once."""
        steps = [record["step"] for record in read_metrics(self.workdir)]
        assert steps == list(range(0, self.steps + 1, self.steps // 20))

    def resumed_at(self) -> list[int]:
        """Returns the steps at which the run resumed, from its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [int(line.split(" at step ")[1].split()[0]) for line in lines if line.startswith("resuming ")]

    def saved(self) -> list[int]:
        folder = self.workdir / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.mark.parametrize("resources", [TWO_TASKS, ("--nodes=2",)], ids=["one node", "two nodes"])
def test_two_tasks_save_and_are_requeued(submit, resources):
    """The cluster kills a step at its first failure (KillOnBadExit=1) unless the script overrides this."""
    job = submit(*resources, steps=60)
    job.wait_for_steps()
    assert job.wait_until()["NodeList"] == ("127.0.0.[1-2]" if "--nodes=2" in resources else "127.0.0.1")
    job.stop()
    job.check_finished()


@pytest.mark.parametrize("partition", ["batch", "hasty"])
def test_preemption(slurm, submit, tmp_path, partition):
    """With GraceTime the process gets one SIGTERM; without it, two SIGTERMs and KillWait seconds."""
    job = submit(f"--partition={partition}", steps=3000)
    job.wait_for_steps()
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    slurm.wait_until(slurm.submit(*urgent, cwd=tmp_path), JobState="COMPLETED")
    assert job.wait_until()["Restarts"] == "1"
    job.check_finished()


def test_cancelled_job_saves_and_is_not_requeued(slurm, submit):
    job = submit()
    job.wait_for_steps()
    slurm.run("scancel", job.id)
    job.wait_until(JobState="CANCELLED")
    assert job.saved()[-1] % job.every
    time.sleep(8)  # longer than the wait of a requeued job
    fields = job.wait_until()
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")


def test_signal_before_the_run_installs_its_handler(slurm, submit):
    job = submit()
    slurm.wait_for(lambda: slurm.has_task(job.id), "a task", job.id)
    job.stop()
    job.wait_until(Restarts="1")
    job.wait_until(**FINISHED, Restarts="1")
    job.check_logged()
    assert "status 143; requeueing" in job.log.read_text()


def test_signal_to_every_process_of_the_job(submit):
    """`--full` signals srun, which kills its tasks: the steps since the last checkpoint are repeated."""
    job = submit()
    job.wait_for_steps()
    job.stop("--full")
    job.wait_until(**FINISHED, Restarts="1")
    job.check_logged()


def test_dead_task_ends_the_others_and_requeues(slurm, submit):
    job = submit(*TWO_TASKS, steps=60, RETRY_AFTER="0")
    slurm.wait_for((job.workdir / "checkpoints" / "30").is_dir, "a checkpoint", job.id)
    os.kill(slurm.task_pid(job.id, task=1), signal.SIGKILL)
    job.wait_until(**FINISHED, Restarts="1")
    job.check_logged()
    assert len(job.resumed_at()) == 1


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({"RETRY_AFTER": "0"}, "2:0"),  # user error: unknown flag
        ({"MODULE": "dualsm.absent"}, "1:0"),  # fails immediately
        ({"MODULE": "dualsm.absent", "RETRY_AFTER": "0", "RESTARTS": "0"}, "1:0"),
    ],
)
def test_final_failures_are_not_requeued(slurm, tmp_path, variables, status):
    variables = {"PYTHON": sys.executable} | variables
    job = slurm.submit(*ONE_TASK, SCRIPT, "--nonsense=1", cwd=tmp_path, **variables)
    fields = slurm.wait_until(job, JobState="FAILED")
    assert (fields["ExitCode"], fields["Restarts"]) == (status, "0")


@pytest.mark.parametrize("state", ["drain", "down"])
def test_lost_node(slurm, submit, state):
    """A job on a drained node continues until it is stopped; SLURM requeues the jobs of a failed node."""
    job = submit("--partition=hasty")
    job.wait_for_steps()
    node = job.wait_until()["NodeList"]
    (other,) = set(real.NODES) - {node}
    slurm.run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")
    try:
        if state == "drain":
            job.stop()
        assert job.wait_until(**FINISHED, Restarts="1")["NodeList"] == other
    finally:
        slurm.run("scontrol", "update", f"NodeName={node}", "State=resume")
    job.check_logged()
    if state == "drain":
        job.check_finished()


def test_run_resumes_after_each_of_two_time_limits(slurm, submit, tmp_path):
    """SLURM checks time limits every 30 seconds; until then the process is suspended with SIGSTOP."""
    job = submit()
    for restarts in (1, 2):
        known = len(read_metrics(job.workdir))
        slurm.wait_for(lambda known=known: len(read_metrics(job.workdir)) > known, "steps are logged", job.id)
        pid = slurm.task_pid(job.id, task=0)
        os.kill(pid, signal.SIGSTOP)
        hours, minutes, _ = map(int, job.wait_until()["RunTime"].split(":"))
        limit = 60 * hours + minutes + 3  # minutes; the signal is sent 300 seconds before the limit
        slurm.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={limit}")
        slurm.wait_for(lambda pid=pid: not is_stopped(pid), "SLURM signals the process", job.id)
        job.wait_until(Restarts=str(restarts))
        slurm.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.wait_until(**FINISHED, Restarts="2")
    job.check_logged()
    print(log := job.log.read_text())
    assert log.count("status 75; requeueing") == 2
    assert len(job.resumed_at()) == 2
    reference = tmp_path / "reference"
    done = run_command("dualsm.train", *job.arguments, f"--workdir={reference}", timeout=600)
    assert done.returncode == 0, done.stderr
    for a, b in zip(*map(jax.tree.leaves, (weights(job.workdir), weights(reference))), strict=True):
        np.testing.assert_array_equal(a, b)
    print(f"weights of {job.workdir} and {reference} are bit-identical")


def is_stopped(pid: int) -> bool:
    """Returns True if SIGSTOP holds a process; SLURM sends SIGCONT with other signals."""
    try:
        return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return False


def test_jobs_of_a_sweep(slurm, corpus_path, tmp_path):
    """Runs one cell at a time; stops the first and the last one, which has the job ID of the array."""
    folder = tmp_path / "sweep"
    recipe = write_recipe(tmp_path / "recipe.py", corpus_path, steps=2000)
    overrides = [
        f"--config.{name}.every={every}"
        for name, every in (("log", 100), ("checkpoint", 1000), ("valid", 1000))
    ]
    grid = ["--grid=repetitions=100", "--grid=alpha=0,1/2,1", "--tasks=valid", "--modes=causal"]
    command = ["dualsm.sweep", f"--config={recipe}", f"--workdir={folder}", *overrides, *grid]
    printed = run_command(*command, "--launch=slurm", "--jobs=1")
    assert printed.returncode == 0, printed.stderr
    script = tmp_path / "sweep.sbatch"
    script.write_text(printed.stdout)
    output = f"--output={tmp_path}/%a.log"
    array = slurm.submit(output, "--time=60", str(script), cwd=ROOT, PYTHON=sys.executable)
    cells = [folder / "cells" / f"repetitions=100,alpha={alpha}" for alpha in ("0", "0.5", "1")]
    for task in (0, 2):
        slurm.wait_for(lambda cell=cells[task]: len(read_metrics(cell)) >= 2, "steps", f"{array}_{task}")
        running = slurm.run("squeue", "--noheader", "--array", "--states=RUNNING", f"--jobs={array}")
        assert len(running.splitlines()) == 1
        # Signals the step: for a task of a limited array, scancel sends the signal and then reports an error.
        step = slurm.show(f"{array}_{task}")["JobId"] + ".0"
        slurm.run("scancel", "--signal=TERM", step)
    for task, (cell, restarts) in enumerate(zip(cells, "101", strict=True)):
        slurm.wait_until(f"{array}_{task}", **FINISHED, Restarts=restarts)
        (results,) = (cell / "eval").glob("*.json")
        assert json.loads(results.read_text())["held_out"]
        assert [record["step"] for record in read_metrics(cell)] == list(range(0, 2001, 100))
    again = run_command(*command)
    assert again.returncode == 0, again.stderr
    assert not list((folder / "logs").glob("*"))  # no cell was left to run


def weights(workdir: Path) -> dict:
    """Returns the parameters of a run's newest checkpoint."""
    config = load_config((workdir / "config.json").read_text())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    step, params = restore_params(workdir, shapes)
    assert step == config.steps
    return jax.tree.map(np.asarray, params)
