"""A sweep: a folder of cells, each an ordinary run directory with a record of how it ended."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dualsm.config import check_config, difference, valid_objectives
from dualsm.data.corpus import Corpus
from dualsm.evaluation.spec import EvalSpec
from dualsm.process.errors import UserError
from dualsm.process.progress import warn
from dualsm.rundir.checkpoint import FOLDER
from dualsm.rundir.metrics import METRICS, read_metrics
from dualsm.rundir.results import read_results, results_file
from dualsm.rundir.workdir import read_config
from dualsm.sweeps.cells import CELL, CELLS, CONFIG, SWEEP, read_outcome, read_sweep
from dualsm.sweeps.grid import ALPHA, Cell, apply


class Sweep:
    """A folder of cells."""

    def __init__(
        self,
        folder: Path,
        recipe: str,
        given: dict,
        config: ConfigDict,
        cells: Sequence[Cell],
        asked: EvalSpec | None = None,
    ):
        """
        Args:
          folder: of the sweep.
          recipe: the config file.
          given: config key -> value given on the command line for all cells.
          config: recipe and given values together.
          cells: to run; of several with the same config only the first is kept, with a warning.
          asked: what each finished cell is evaluated on; None: do not evaluate.

        Raises:
          UserError: when a cell's config is impossible, naming the cell.
        """
        self.folder, self.recipe, self.given = folder, recipe, given
        self.cells, self.asked = [], asked
        self.configs: dict[str, ConfigDict] = {}
        self._read: dict[str, tuple[tuple[int, ...], list[dict]]] = {}  # see `records`
        first_names: dict[str, str] = {}
        for cell in cells:
            try:
                own = apply(config, cell.values)
                check_config(own)
            except UserError as error:
                raise UserError(f"cell {cell.name}: {error}") from error
            first = first_names.setdefault(own.to_json(sort_keys=True), cell.name)
            if first != cell.name:
                warn(f"cell {cell.name} has the same config as cell {first}; only {first} is run")
                continue
            self.cells.append(cell)
            self.configs[cell.name] = own

    def path(self, cell: Cell) -> Path:
        return self.folder / CELLS / cell.name

    def commands(self, cell: Cell) -> list[list[str]]:
        """What runs a cell: the training and, where tasks are asked for, the evaluation."""
        mixture = self.configs[cell.name].mixture
        values = self.given | {f"mixture.{name}": share for name, share in mixture.items()}
        values |= {key: value for key, value in cell.values.items() if key != ALPHA}
        overrides = [f"--config.{key}={value}" for key, value in values.items()]
        workdir = f"--workdir={self.path(cell)}"
        train = ["-m", "dualsm.train", f"--config={self.recipe}", workdir, *overrides]
        if self.asked is None:
            return [train]
        asked = self.asked
        evaluate = [
            "-m", "dualsm.evaluate", workdir, f"--tasks={','.join(asked.tasks)}",
            f"--task_data={asked.task_data}", f"--modes={','.join(asked.modes)}", f"--limit={asked.limit}",
        ]  # fmt: skip
        return [train, evaluate]

    def remaining(self, cell: Cell) -> list[list[str]]:
        """The commands that are still to be run for a cell."""
        if self.outcome(cell):
            return []
        return self.commands(cell)[1 if self._trained(cell) else 0 :]

    def environment(self) -> dict[str, str]:
        """What the cells' processes find set, so that Weights & Biases shows them as one group."""
        return {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP") or self.folder.absolute().name}

    def check(self) -> None:
        """Sees that the folder is this sweep's and that what is to be run can begin.

        Raises:
          UserError: when the folder holds another sweep, when a cell there was trained with another config
            than is asked for now, and when a corpus is missing.
        """
        path = self.folder / SWEEP
        old = read_sweep(self.folder) if path.exists() else None
        if old and (old.get("config"), old.get("given")) != (self.recipe, self.given):
            given = old.get("given") or "no overrides"
            raise UserError(
                f"{self.folder} holds a sweep of {old.get('config')} with {given}; choose another --workdir"
            )
        for cell in self.cells:
            self._check_cell(cell)
        to_train = [cell for cell in self.cells if not self.outcome(cell) and not self._trained(cell)]
        for path in dict.fromkeys(self.configs[cell.name].data.path for cell in to_train):
            Corpus(path)

    def _check_cell(self, cell: Cell) -> None:
        """Raises `UserError` when a cell's folder holds a run of another config than it has now."""
        folder = self.path(cell)
        if not (folder / CONFIG).exists():
            return
        if changes := difference(read_config(folder), self.configs[cell.name]):
            raise UserError(
                f"cell {cell.name}: {folder} holds a run of another config ({'; '.join(changes)}); delete "
                "that folder to train it anew, or choose another --workdir"
            )

    def write_plan(self, grid: dict) -> None:
        """Writes `sweep.json`; the cells of earlier calls stay in it."""
        path = self.folder / SWEEP
        cells = read_sweep(self.folder)["cells"] if path.exists() else {}
        cells |= {cell.name: cell.values for cell in self.cells}
        _write_json(path, {"config": self.recipe, "given": self.given, "grid": grid, "cells": cells})

    def records(self, cell: Cell) -> list[dict]:
        """The first and the last log line of a cell, and the last of training and of validation, in order.

        A file that has not changed since the last call is not read again.
        """
        path = self.path(cell) / METRICS
        try:
            stat = path.stat()
        except OSError:
            return []
        version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._read.get(cell.name, ((), []))[0] != version:
            self._read[cell.name] = version, _telling(read_metrics(path.parent))
        return self._read[cell.name][1]

    def outcome(self, cell: Cell) -> dict | None:
        """What came of a cell: done, diverged, or None while it is to be run or run on."""
        recorded = self.recorded(cell)
        if recorded.get("status") == "diverged":
            return recorded
        records = self.records(cell)
        if not records:
            return None
        if records[-1]["step"] < self.configs[cell.name].steps:
            return None
        if reason := _divergence(records):
            return {"status": "diverged", "reason": reason}
        return {"status": "done", "reason": ""} if self._evaluated(cell) else None

    def _trained(self, cell: Cell) -> bool:
        """Whether a cell's last log line and its last checkpoint are there."""
        records, steps = self.records(cell), self.configs[cell.name].steps
        logged = bool(records) and records[-1]["step"] >= steps
        return logged and (self.path(cell) / FOLDER / str(steps)).is_dir()

    def _evaluated(self, cell: Cell) -> bool:
        """Whether the file of a cell's last checkpoint has all that is asked for."""
        if self.asked is None:
            return True
        try:
            results = read_results(results_file(self.path(cell), self.configs[cell.name].steps))
        except UserError:  # which the evaluation tells
            return False
        return self.asked.is_complete(results)

    def record(self, cell: Cell, outcome: dict, seconds: float | None) -> None:
        """Writes a cell's `cell.json`."""
        path = self.path(cell) / CELL
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, outcome | {"seconds": seconds})

    def recorded(self, cell: Cell) -> dict:
        """A cell's `cell.json`; {} where there is none, or a damaged one: the run tells what it said."""
        try:
            return read_outcome(self.path(cell)) or {}
        except (OSError, ValueError):
            return {}

    def row(self, cell: Cell) -> list[str]:
        """A cell's line in the live table."""
        records = self.records(cell)
        recorded = self.recorded(cell)
        step, steps = (records[-1]["step"] if records else 0), self.configs[cell.name].steps
        scores = [r for r in records if _is_validation(r)]
        losses = [scores[-1].get(f"valid/{name}/loss") if scores else None for name in self.names()]
        shown = [f"{loss:.3f}" if loss is not None else "" for loss in losses]
        status = recorded.get("status", "running" if records and step < steps else "")
        return [cell.name, status, f"{step}/{steps}", *shown, f"{(recorded.get('seconds') or 0) / 60:.1f}"]

    def names(self) -> list[str]:
        return valid_objectives(self.configs[self.cells[0].name])

    def header(self) -> list[str]:
        return ["cell", "status", "step", *self.names(), "minutes"]


def _is_training(record: dict) -> bool:
    return "train/loss" in record or "train/skipped" in record


def _is_validation(record: dict) -> bool:
    return any(name.startswith("valid/") for name in record)


def _telling(records: list[dict]) -> list[dict]:
    """The records that `Sweep.records` returns, each once."""
    kinds = (_is_training, _is_validation)
    last = {max((i for i, r in enumerate(records) if of_kind(r)), default=0) for of_kind in kinds}
    return [records[i] for i in sorted({0, *last, len(records) - 1})] if records else []


def _divergence(records: list[dict]) -> str:
    """Why a run that came to its end counts as diverged; empty when it does not.

    Its training tells, not its held-out losses: those of a run that overfits are high as well.
    """
    trained = [r for r in records if _is_training(r)]
    untrained = [loss for name, loss in records[0].items() if re.fullmatch("valid/.*/loss", name)]
    if trained and "train/loss" not in trained[-1]:
        return "diverged: the last updates were all skipped for numbers that are not finite"
    if trained and untrained and trained[-1]["train/loss"] > 2 * max(untrained):
        return (
            f"diverged: training ends at a loss of {trained[-1]['train/loss']:.3g} nats a token, "
            f"the untrained model had {max(untrained):.3g}"
        )
    return ""


def _write_json(path: Path, value: dict) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    aside.replace(path)
