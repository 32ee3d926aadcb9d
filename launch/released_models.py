"""Scores the paper's 50 released models as a sweep, for recommendations at 470M parameters.

    python launch/released_models.py --sweep=runs/released --tasks=blimp,arc_easy --task_data=eval
    dualsm recommend --unique_tokens=1e9 --budget=3.2e10 --sweep=runs/released/table.csv \\
        --metric=task/mean/causal

Each branch `alpha_ALPHA_n-reps=R` becomes a cell of the sweep: its weights are downloaded and imported, the
cell is evaluated, and the imported weights are removed. The command continues where it was stopped.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dualsm.analysis.scales import ALPHAS
from dualsm.analysis.table import TABLE, load, write_table
from dualsm.exchange.hub import SCHEME, list_branches
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.output import write_atomically
from dualsm.process.progress import say
from dualsm.rundir.checkpoint_folder import CHECKPOINTS
from dualsm.sweeps.cells import CELL, CELLS, SWEEP, read_sweep

_BRANCH = re.compile(r"alpha_(\d\.\d{3})_n-reps=(\d+)")

_SWEEP = cli.DEFINE_path("sweep", None, "folder of the sweep, which is created")
_MODELS = cli.DEFINE_path(
    "models", "hf://ltg/dual-lm-470m", "repository on the Hub, or a folder with one folder per branch"
)
_CONFIG = flags.DEFINE_string("config", "dualsm:dual_470m", "config that takes alpha and repetitions")
_TASKS = flags.DEFINE_string("tasks", None, "tasks of `dualsm evaluate`, separated by commas")
_TASK_DATA = cli.DEFINE_path("task_data", "", "folder with the tasks' files")
_MODES = flags.DEFINE_string("modes", "causal,prefix,masked", "scoring modes")
_LIMIT = flags.DEFINE_integer("limit", 0, "maximum number of questions per task; 0: all", lower_bound=0)
_KEEP = flags.DEFINE_bool("keep", False, "keep the imported weights (1.9 GB per model)")
flags.mark_flags_as_required(["sweep", "tasks"])


def branches(models: str) -> dict[str, dict]:
    """Returns the swept values of each released model by the name of its branch.

    Args:
      models: `hf://OWNER/NAME`, or a folder with one folder per branch.

    Raises:
      UserError: if there is no such branch, or the Hub cannot be reached.
    """
    if models.startswith(SCHEME):
        names = list_branches(models, "--models")
    else:
        names = sorted(path.name for path in Path(models).glob("alpha_*"))
    found = {name: cell_values(name) for name in names if _BRANCH.fullmatch(name)}
    if not found:
        raise UserError(f"--models={models} has no branch alpha_ALPHA_n-reps=R; check the name")
    return found


def cell_values(branch: str) -> dict:
    """Returns R and alpha of a branch; its name has alpha rounded to three digits.

    Raises:
      UserError: if no alpha of the paper's grid is that close.
    """
    alpha, repetitions = _BRANCH.fullmatch(branch).groups()
    nearest = min(ALPHAS, key=lambda value: abs(value - float(alpha)))
    if abs(nearest - float(alpha)) > 0.00051:
        raise UserError(f"branch {branch}: no alpha of the grid is {alpha} when rounded")
    return {"repetitions": int(repetitions), "alpha": float(nearest)}


def import_command(weights: str, values: dict, workdir: Path) -> list[str]:
    """Returns the arguments of `dualsm convert` that import a released model with its config."""
    config = f"{_CONFIG.value}:alpha={values['alpha']!r},repetitions={values['repetitions']}"
    return [
        "dualsm.convert", "import", "--format=reference", f"--weights={weights}", f"--workdir={workdir}",
        f"--config={config}", "--config.objectives.causal.weight=2.0",  # see configs/dual_470m.py
    ]  # fmt: skip


def evaluate_command(workdir: Path) -> list[str]:
    """Returns the arguments of `dualsm evaluate`."""
    return [
        "dualsm.evaluate", f"--workdir={workdir}", f"--tasks={_TASKS.value}", f"--modes={_MODES.value}",
        f"--task_data={_TASK_DATA.value}", f"--limit={_LIMIT.value}", "--baselines=",
    ]  # fmt: skip


def run(command: list[str]) -> None:
    """Runs a command of dualsm. Raises `UserError` if it fails; its own message is on stderr."""
    status = subprocess.run([sys.executable, "-m", *command], check=False).returncode
    if status:
        raise UserError(f"{' '.join(command[:2])} failed with status {status}; run the same command again")


def score(weights: str, values: dict, workdir: Path) -> None:
    """Imports and evaluates one model, and writes `cell.json`."""
    start = time.perf_counter()
    if not (workdir / CHECKPOINTS).is_dir():
        shutil.rmtree(workdir, ignore_errors=True)  # nothing was scored
        run(import_command(weights, values, workdir))
    run(evaluate_command(workdir))
    outcome = {"status": "done", "reason": "", "seconds": time.perf_counter() - start}
    write_atomically(workdir / CELL, json.dumps(outcome))


def main(_: Sequence[str]) -> None:
    sweep, models = Path(_SWEEP.value), _MODELS.value
    cells = branches(models)
    (sweep / CELLS).mkdir(parents=True, exist_ok=True)
    given = {flag.name: flag.value for flag in (_MODELS, _TASKS, _MODES, _LIMIT)}
    if (sweep / SWEEP).exists():
        old = read_sweep(sweep)
        if (old.get("config"), old.get("given")) != (_CONFIG.value, given):
            raise UserError(
                f"--sweep={sweep} was made with config {old.get('config')} and {old.get('given')}; use the "
                "same flags, or choose another --sweep"
            )
    description = {"config": _CONFIG.value, "given": given, "grid": {}, "cells": cells}
    write_atomically(sweep / SWEEP, json.dumps(description))
    for number, (name, values) in enumerate(cells.items(), 1):
        workdir = sweep / CELLS / name
        if not (workdir / CELL).exists():
            say(f"{number} of {len(cells)}: {name}")
            separator = "@" if models.startswith(SCHEME) else "/"
            score(f"{models}{separator}{name}", values, workdir)
            write_table(sweep / TABLE, load(sweep))
        if not _KEEP.value:  # after `cell.json`: a checkpoint that is deleted in part cannot be evaluated
            shutil.rmtree(workdir / CHECKPOINTS, ignore_errors=True)
    write_table(sweep / TABLE, load(sweep))
    say(f"{len(cells)} models: {sweep / TABLE}")


if __name__ == "__main__":
    cli.run(main)
