"""Running a sweep: a folder of cells, each an ordinary run directory with a record of how it ended."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dualsm.analysis.grid import ALPHA, Cell, apply
from dualsm.config import check_config, valid_objectives
from dualsm.errors import UserError
from dualsm.progress import Board
from dualsm.training.metrics import read_metrics


class Sweep:
    """A folder of cells."""

    def __init__(
        self,
        folder: Path,
        recipe: str,
        given: dict,
        config: ConfigDict,
        cells: Sequence[Cell],
        evaluation: Sequence[str] = (),
    ):
        """
        Args:
          folder: of the sweep.
          recipe: the config file.
          given: config key -> value given on the command line for all cells.
          config: recipe and given values together.
          cells: to run.
          evaluation: flags of `dualsm.evaluate` for each finished cell; empty: do not evaluate.

        Raises:
          UserError: when a cell's config is impossible, naming the cell.
        """
        self.folder, self.recipe, self.given = folder, recipe, given
        self.cells, self.evaluation = list(cells), list(evaluation)
        self.configs: dict[str, ConfigDict] = {}
        for cell in self.cells:
            try:
                self.configs[cell.name] = apply(config, cell.values)
                check_config(self.configs[cell.name])
            except UserError as error:
                raise UserError(f"cell {cell.name}: {error}") from error

    def path(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def commands(self, cell: Cell) -> list[list[str]]:
        """What runs a cell: the training and, where tasks are asked for, the evaluation."""
        mixture = self.configs[cell.name].mixture
        values = self.given | {f"mixture.{name}": share for name, share in mixture.items()}
        values |= {key: value for key, value in cell.values.items() if key != ALPHA}
        overrides = [f"--config.{key}={value}" for key, value in values.items()]
        workdir = f"--workdir={self.path(cell)}"
        train = ["-m", "dualsm.train", f"--config={self.recipe}", workdir, *overrides]
        return [train, ["-m", "dualsm.evaluate", workdir, *self.evaluation]] if self.evaluation else [train]

    def environment(self) -> dict[str, str]:
        """What the cells' processes find set, so that Weights & Biases shows them as one group."""
        return {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP") or self.folder.absolute().name}

    def write_plan(self, grid: dict) -> None:
        """Writes `sweep.json`; the cells of earlier calls stay in it."""
        path = self.folder / "sweep.json"
        plan = {"config": self.recipe, "given": self.given, "grid": grid, "cells": {}}
        if path.exists():
            old = json.loads(path.read_text())
            if (old["config"], old["given"]) != (plan["config"], plan["given"]):
                raise UserError(
                    f"{self.folder} holds a sweep of {old['config']} with {old['given'] or 'no overrides'}; "
                    "choose another --workdir"
                )
            plan["cells"] = old["cells"]
        plan["cells"] |= {cell.name: cell.values for cell in self.cells}
        _write_json(path, plan)

    def outcome(self, cell: Cell) -> dict | None:
        """What came of a cell: done, diverged, or None while it is to be run or run on."""
        recorded = self._recorded(cell)
        if recorded.get("status") == "diverged":
            return recorded
        records = read_metrics(self.path(cell))
        if not records:
            return None
        if records[-1]["step"] < self.configs[cell.name].steps:
            return None
        if reason := _divergence(records):
            return {"status": "diverged", "reason": reason}
        evaluated = not self.evaluation or any((self.path(cell) / "eval").glob("*.json"))
        return {"status": "done", "reason": ""} if evaluated else None

    def record(self, cell: Cell, outcome: dict, seconds: float | None) -> None:
        """Writes a cell's `cell.json`."""
        path = self.path(cell) / "cell.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, outcome | {"seconds": seconds})

    def _recorded(self, cell: Cell) -> dict:
        path = self.path(cell) / "cell.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def row(self, cell: Cell) -> list[str]:
        """A cell's line in the live table."""
        records = read_metrics(self.path(cell))
        recorded = self._recorded(cell)
        step, steps = (records[-1]["step"] if records else 0), self.configs[cell.name].steps
        scores = [r for r in records if any(name.startswith("valid/") for name in r)]
        losses = [scores[-1].get(f"valid/{name}/loss") if scores else None for name in self.names()]
        shown = [f"{loss:.3f}" if loss is not None else "" for loss in losses]
        status = recorded.get("status", "running" if records and step < steps else "")
        return [cell.name, status, f"{step}/{steps}", *shown, f"{(recorded.get('seconds') or 0) / 60:.1f}"]

    def names(self) -> list[str]:
        return valid_objectives(self.configs[self.cells[0].name])

    def header(self) -> list[str]:
        return ["cell", "status", "step", *self.names(), "minutes"]


def _divergence(records: list[dict]) -> str:
    """Why a run that came to its end counts as diverged; empty when it does not.

    Its training tells, not its held-out losses: those of a run that overfits are high as well.
    """
    trained = [r for r in records if "train/loss" in r or "train/skipped" in r]
    untrained = [loss for name, loss in records[0].items() if re.fullmatch("valid/.*/loss", name)]
    if trained and "train/loss" not in trained[-1]:
        return "diverged: the last updates were all skipped for numbers that are not finite"
    if trained and untrained and trained[-1]["train/loss"] > 2 * max(untrained):
        return (
            f"diverged: training ends at a loss of {trained[-1]['train/loss']:.3g} nats a token, "
            f"the untrained model had {max(untrained):.3g}"
        )
    return ""


class _Job:
    """A cell that is running: one process after another."""

    def __init__(self, sweep: Sweep, cell: Cell, slot: int, jobs: int):
        self.sweep, self.cell, self.slot, self.jobs = sweep, cell, slot, jobs
        self.start, self.waiting = time.monotonic(), deque(sweep.commands(cell))
        self.log = sweep.folder / "logs" / f"{cell.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        _clear(sweep.path(cell))
        self.process = self._next()

    def _next(self) -> subprocess.Popen:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        own = cores[self.slot :: self.jobs] or cores
        command, env = [sys.executable, *self.waiting.popleft()], os.environ | self.sweep.environment()
        with self.log.open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        if own and self.jobs > 1:  # before its imports are done it has no other threads
            os.sched_setaffinity(process.pid, own)
        return process

    def finished(self) -> bool:
        """Whether the cell has come to its end, recorded then."""
        if self.process.poll() is None:
            return False
        if self.process.returncode == 0 and self.waiting:
            self.process = self._next()
            return False
        outcome = self.sweep.outcome(self.cell) if self.process.returncode == 0 else None
        self.sweep.record(self.cell, outcome or self._failure(), time.monotonic() - self.start)
        return True

    def _failure(self) -> dict:
        """What the log says last; a run that gave up on its numbers says that it diverged."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1][-500:] if lines else f"exit status {self.process.returncode}"
        _, error, line = reason.rpartition("error: ")  # which a progress bar may precede in its line
        reason = error + line
        return {"status": "diverged" if "error: diverged" in reason else "failed", "reason": reason}


def run_missing(sweep: Sweep, jobs: int) -> None:
    """Runs the cells that are neither done nor diverged, `jobs` at a time, and shows how they stand."""
    waiting: deque[Cell] = deque()
    for cell in sweep.cells:
        outcome = sweep.outcome(cell)
        if outcome is None:
            waiting.append(cell)
        elif not (sweep.path(cell) / "cell.json").exists():  # run elsewhere
            sweep.record(cell, outcome, None)
    running: dict[int, _Job] = {}
    board = Board(sweep.header())
    try:
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting:
                    running[slot] = _Job(sweep, waiting.popleft(), slot, jobs)
            board.show([sweep.row(cell) for cell in sweep.cells])
            time.sleep(0.5)
            running = {slot: job for slot, job in running.items() if not job.finished()}
        board.show([sweep.row(cell) for cell in sweep.cells], final=True)
    finally:
        for job in running.values():
            job.process.terminate()  # it saves, so that the sweep can go on from there
        for job in running.values():
            job.process.wait()


def job_list(sweep: Sweep, launcher: str) -> str:
    """The sweep as jobs of a cluster, one a cell: a script for SLURM, or for `launch/tpu_vm.sh`."""
    return _tpu_jobs(sweep) if launcher == "tpu" else _slurm_array(sweep)


def _slurm_array(sweep: Sweep) -> str:
    lines = [
        " && ".join(shlex.join(["python", *command]) for command in sweep.commands(cell))
        for cell in sweep.cells
    ]
    cells = "\n".join(f"  {shlex.quote(line)}" for line in lines)
    exports = "".join(f"export {name}={shlex.quote(v)}\n" for name, v in sweep.environment().items())
    return (
        "#!/usr/bin/env bash\n"
        f"#SBATCH --job-name=dualsm-sweep --array=0-{len(lines) - 1} --nodes=1 --signal=TERM@120 --requeue\n"
        f"{exports}"
        f"cells=(\n{cells}\n)\n"
        'eval "exec srun bash -c ${cells[$SLURM_ARRAY_TASK_ID]@Q}"'
    )


def _tpu_jobs(sweep: Sweep) -> str:
    """One slice a cell; its run lies in the bucket until it is fetched."""
    starts, fetches = [], []
    for number, cell in enumerate(sweep.cells):
        name = f"{sweep.folder.name}-{number}"
        train = [flag for flag in sweep.commands(cell)[0][2:] if not flag.startswith("--workdir=")]
        starts.append(f"NAME={shlex.quote(name)} launch/tpu_vm.sh train {shlex.join(train)}")
        target = shlex.quote(str(sweep.path(cell)))
        fetches.append(f'#   gcloud storage cp -r "gs://$BUCKET/runs/{name}" {target}')
    return "\n".join(
        ["#!/usr/bin/env bash", "set -eu", *starts]
        + ["# When they are done, fetch the runs; the sweep command without --launch then reports on them:"]
        + fetches
    )


def _clear(folder: Path) -> None:
    """Takes away what an earlier try recorded, so that the folder is a run directory or nothing."""
    (folder / "cell.json").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write_json(path: Path, value: dict) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    aside.replace(path)
