"""The folder of a sweep: one run directory per cell, with a record of its outcome."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from dualsm.config import check_config, difference, valid_objectives
from dualsm.data.corpus import Corpus
from dualsm.evaluation.spec import HELD_OUT, EvalSpec
from dualsm.objectives.sources import trained_sources
from dualsm.process.errors import UserError
from dualsm.process.output import write_atomically
from dualsm.process.paths import absolute, is_remote, retry, size_and_time
from dualsm.process.progress import warn
from dualsm.rundir.checkpoint_folder import has_checkpoint
from dualsm.rundir.metrics import METRICS, read_metrics
from dualsm.rundir.results import read_results, results_file
from dualsm.rundir.workdir import read_config
from dualsm.sweeps.cells import CELL, CELLS, CONFIG, SWEEP, read_outcome, read_sweep
from dualsm.sweeps.grid import ALPHA, Cell, apply


class Sweep:
    """A sweep: its folder, cells and configs."""

    def __init__(
        self,
        folder: epath.Path,
        recipe: str,
        overrides: dict,
        config: ConfigDict,
        cells: Sequence[Cell],
        eval_spec: EvalSpec | None = None,
    ):
        """
        Args:
          folder: folder of the sweep.
          recipe: path of the config file.
          overrides: config key -> value from the command line, for all cells.
          config: the recipe with the overrides.
          cells: cells to run. Of several cells with the same config only the first is kept, with a warning.
          eval_spec: evaluation of each finished cell; None for no evaluation.

        Raises:
          UserError: if the config of a cell is invalid; the message names the cell.
        """
        self.folder, self.recipe, self.overrides = folder, recipe, overrides
        self.cells, self.eval_spec = [], eval_spec
        self.configs: dict[str, ConfigDict] = {}
        self._cached: dict[str, tuple[tuple[int, ...], list[dict]]] = {}  # see `records`
        self._rows: dict[str, list[str]] = {}  # last rows of the status table
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

    def path(self, cell: Cell) -> epath.Path:
        return self.folder / CELLS / cell.name

    def commands(self, cell: Cell) -> list[list[str]]:
        """Returns the commands that train a cell and, with an `eval_spec`, evaluate it."""
        mixture = self.configs[cell.name].mixture
        values = self.overrides | {f"mixture.{name}": share for name, share in mixture.items()}
        values |= {key: value for key, value in cell.values.items() if key != ALPHA}
        overrides = [f"--config.{key}={value}" for key, value in values.items()]
        workdir = f"--workdir={self.path(cell)}"
        train = ["-m", "dualsm.train", f"--config={self.recipe}", workdir, *overrides]
        if self.eval_spec is None:
            return [train]
        spec = self.eval_spec
        evaluate = [
            "-m", "dualsm.evaluate", workdir, f"--tasks={','.join(spec.tasks)}",
            f"--task_data={spec.task_data}", f"--modes={','.join(spec.modes)}", f"--limit={spec.limit}",
            "--baselines=",  # no column of the table has them
        ]  # fmt: skip
        if self._scores_held_out():
            evaluate += _data_flags(self.configs[cell.name])
        return [train, evaluate]

    def _scores_held_out(self) -> bool:
        return self.eval_spec is not None and HELD_OUT in self.eval_spec.tasks

    def remaining(self, cell: Cell) -> list[list[str]]:
        """Returns the commands that still have to run for a cell."""
        if self.outcome(cell):
            return []
        return self.commands(cell)[1 if self._trained(cell) else 0 :]

    def environment(self) -> dict[str, str]:
        """Returns environment variables that group the cells in Weights & Biases."""
        return {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP") or absolute(self.folder).name}

    def check(self) -> None:
        """Checks that the folder belongs to this sweep and that the remaining cells can start.

        Raises:
          UserError: if the folder contains another sweep, a cell was trained with a different config, or a
            corpus is missing.
        """
        path = self.folder / SWEEP
        old = read_sweep(self.folder) if path.exists() else None
        if old and (old.get("config"), old.get("given")) != (self.recipe, self.overrides):
            old_overrides = old.get("given") or "no overrides"
            raise UserError(
                f"{self.folder} contains a sweep of {old.get('config')} with {old_overrides}; "
                "choose another --workdir"
            )
        for cell in self.cells:
            self._check_cell(cell)
        reading = [
            cell
            for cell in self.cells
            if not self.outcome(cell) and (self._scores_held_out() or not self._trained(cell))
        ]
        sources = (source for cell in reading for source in trained_sources(self.configs[cell.name]))
        for path, key in dict.fromkeys((source.corpus, source.corpus_key) for source in sources):
            Corpus(path, key)

    def _check_cell(self, cell: Cell) -> None:
        """Raises `UserError` if a cell's folder contains a run with a different config."""
        folder = self.path(cell)
        if not (folder / CONFIG).exists():
            return
        if changes := difference(read_config(folder), self.configs[cell.name]):
            raise UserError(
                f"cell {cell.name}: {folder} contains a run with a different config ({'; '.join(changes)}); "
                "delete that folder to train the cell again, or choose another --workdir"
            )

    def write_plan(self, grid: dict) -> None:
        """Writes `sweep.json`; cells of earlier calls are kept."""
        path = self.folder / SWEEP
        cells = read_sweep(self.folder)["cells"] if path.exists() else {}
        cells |= {cell.name: cell.values for cell in self.cells}
        _write_json(path, {"config": self.recipe, "given": self.overrides, "grid": grid, "cells": cells})

    def records(self, cell: Cell) -> list[dict]:
        """Returns a cell's first and last log lines, and the last ones of training and validation, in order.

        The file is read again only if it has changed since the last call. A damaged file counts as empty:
        the run of the cell reports the error. In a bucket, a failed request raises an exception.
        """
        path = self.path(cell) / METRICS
        try:
            version = size_and_time(path)
        except OSError as error:
            if is_remote(path) and not isinstance(error, FileNotFoundError):
                raise
            return []
        if self._cached.get(cell.name, ((), []))[0] != version:
            try:
                records = read_metrics(path.parent)
            except UserError:
                records = []
            self._cached[cell.name] = version, _status_records(records)
        return self._cached[cell.name][1]

    def outcome(self, cell: Cell) -> dict | None:
        """Returns the outcome of a cell (done or diverged); None if it still has to run."""
        return retry(lambda: self._outcome(cell), self.folder)

    def _outcome(self, cell: Cell) -> dict | None:
        recorded = self.recorded(cell)
        if recorded.get("status") == "diverged":
            return recorded
        records, steps = self.records(cell), self.configs[cell.name].steps
        if not records or records[-1]["step"] < steps:
            return None
        if reason := _divergence(records):
            return {"status": "diverged", "reason": reason}
        # The run may have failed after its last log line. The checkpoints of a done cell may be deleted.
        if recorded.get("status") != "done" and not has_checkpoint(self.path(cell), steps):
            return None
        return {"status": "done", "reason": ""} if self._evaluated(cell) else None

    def _trained(self, cell: Cell) -> bool:
        """Returns True if a cell's last log line and last checkpoint exist."""
        return retry(lambda: self._has_last_checkpoint(cell), self.folder)

    def _has_last_checkpoint(self, cell: Cell) -> bool:
        records, steps = self.records(cell), self.configs[cell.name].steps
        if not records or records[-1]["step"] < steps:
            return False
        return has_checkpoint(self.path(cell), steps)

    def _evaluated(self, cell: Cell) -> bool:
        """Returns True if the results of a cell's last checkpoint cover `eval_spec`."""
        if self.eval_spec is None:
            return True
        try:
            results = read_results(results_file(self.path(cell), self.configs[cell.name].steps))
        except UserError:  # the evaluation reports the error
            return False
        return self.eval_spec.is_complete(results)

    def record(self, cell: Cell, outcome: dict, seconds: float | None) -> None:
        """Writes a cell's `cell.json`.

        Args:
          cell: the cell.
          outcome: `status` and `reason`.
          seconds: duration of all sessions of the cell; None if it is unknown.
        """
        path = self.path(cell) / CELL
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, outcome | {"seconds": seconds})

    def recorded(self, cell: Cell) -> dict:
        """Returns a cell's `cell.json`; {} if it is missing or damaged."""
        try:
            return read_outcome(self.path(cell)) or {}
        except (OSError, ValueError):
            return {}

    def row(self, cell: Cell) -> list[str]:
        """Returns a cell's row of the status table; its last row if a request to a bucket fails."""
        try:
            self._rows[cell.name] = self._new_row(cell)
        except Exception:  # the sweep and its cells continue
            if not is_remote(self.folder):
                raise
        return self._rows.get(cell.name) or [cell.name, *[""] * (len(self.header()) - 1)]

    def _new_row(self, cell: Cell) -> list[str]:
        records = self.records(cell)
        recorded = self.recorded(cell)
        step, steps = (records[-1]["step"] if records else 0), self.configs[cell.name].steps
        scores = [r for r in records if _is_validation(r)]
        losses = [_held_out_loss(scores[-1], name) if scores else None for name in self.names()]
        shown = [f"{loss:.3f}" if loss is not None else "" for loss in losses]
        status = recorded.get("status", "running" if records and step < steps else "")
        seconds = recorded.get("seconds")
        minutes = "" if seconds is None else f"{seconds / 60:.1f}"
        return [cell.name, status, f"{step}/{steps}", *shown, minutes]

    def names(self) -> list[str]:
        return valid_objectives(self.configs[self.cells[0].name])

    def header(self) -> list[str]:
        return ["cell", "status", "step", *self.names(), "minutes"]


def _data_flags(config: ConfigDict) -> list[str]:
    """Returns the flag `--data` of `dualsm.evaluate` with the corpora of a config.

    The config of a run that was trained on another machine has the paths of that machine. The flag cannot
    express the path of a source with a comma; the evaluation then uses the paths in the config of the run.
    """
    sources = trained_sources(config)
    if not config.sources:
        return [f"--data={sources[0].corpus}"]
    if any("," in source.corpus for source in sources):
        return []
    return ["--data=" + ",".join(f"{source.name}={source.corpus}" for source in sources)]


def _is_training(record: dict) -> bool:
    return "train/loss" in record or "train/skipped" in record


def _is_validation(record: dict) -> bool:
    return any(name.startswith("valid/") for name in record)


def _held_out_loss(record: dict, objective: str) -> float | None:
    """Returns the loss in a validation's record; that of the averaged weights if only they were scored."""
    return record.get(f"valid/{objective}/loss", record.get(f"valid/ema/{objective}/loss"))


def _status_records(records: list[dict]) -> list[dict]:
    """Selects the records that `Sweep.records` returns, without duplicates."""
    kinds = (_is_training, _is_validation)
    last = {max((i for i, r in enumerate(records) if of_kind(r)), default=0) for of_kind in kinds}
    return [records[i] for i in sorted({0, *last, len(records) - 1})] if records else []


def _divergence(records: list[dict]) -> str:
    """Returns the reason why a completed run counts as diverged; "" if it did not diverge.

    The training losses of the objectives decide: held-out losses are high after overfitting too, and
    `train/loss` contains the weights of the objectives.
    """
    trained = [r for r in records if _is_training(r)]
    untrained = [loss for name, loss in records[0].items() if re.fullmatch("valid/.*/loss", name)]
    if trained and "train/loss" not in trained[-1]:
        return "diverged: the last updates were all skipped because they were not finite"
    last = trained[-1] if trained else {}
    losses = {name: loss for name, loss in last.items() if re.fullmatch("train/.*/loss", name)}
    if losses and untrained:
        name = max(losses, key=losses.__getitem__)
        if losses[name] > 2 * max(untrained):
            return (
                f"diverged: the final training loss of {name.removeprefix('train/').removesuffix('/loss')} "
                f"is {losses[name]:.3g} nats per token, but the loss of the untrained model was "
                f"{max(untrained):.3g}"
            )
    return ""


def _write_json(path: epath.Path, value: dict) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")
