"""A sweep's folder as a table: one dict a cell, whatever state the cell is in."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dualsm.process.errors import UserError
from dualsm.rundir.metrics import METRICS, read_metrics

SWEEP, CELLS, CELL, CONFIG = "sweep.json", "cells", "cell.json", "config.json"
# Of a cell. The first three are what the sweep says of a cell it has tried.
STATUSES = ("done", "failed", "diverged", "running", "missing", "damaged")
FINAL_SHARE = 1 / 20  # of the run at its end; the mean over it is the final training loss

Row = dict[str, Any]
# What a file that was cut off, edited or made by something else raises while it is read.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, UserError)


def collect(folder: str | Path) -> list[Row]:
    """One row a cell of a sweep, finished or not, in the order of `sweep.json`.

    The columns are `name`, `status`, `reason`, `repetitions`, `alpha`, `seed`, each key that any cell sets
    (the value in the cell's own config, so that a default equals the same value given), `budget_tokens`,
    `unique_tokens`, `parameters`, `seconds`, `step` (of the last log line) and

    - `valid/<objective>/loss`: the last held-out loss, nats per token;
    - `best/<objective>/loss`, `best/<objective>/step`: the lowest of the run, and when;
    - `train/<objective>/loss`: the mean over the log lines of the run's last twentieth;
    - `held_out/<objective>/loss`: as `dualsm.evaluate` measured it;
    - `task/<task>/<mode>`: score with 0 for guessing and 100 for perfect, and `task/mean/<mode>` for cells
      that were scored on every task that any cell was.

    What is not known is None. A cell that cannot be read is a row with the status "damaged".

    Raises:
      UserError: when the folder holds no readable `sweep.json`.
    """
    cells = read_sweep(folder)["cells"]
    nothing = dict.fromkeys(key for values in cells.values() for key in values)
    rows = [cell_row(Path(folder) / CELLS / name, name, nothing | values) for name, values in cells.items()]
    _add_task_means(rows)
    return rows


def read_sweep(folder: str | Path) -> dict:
    """The content of `sweep.json`: `config`, `grid` and `cells`, name -> swept values.

    Raises:
      UserError: when it is missing or not such a file.
    """
    path = Path(folder) / SWEEP
    try:
        sweep = json.loads(path.read_text())
        if not all(isinstance(values, dict) for values in sweep["cells"].values()):
            raise ValueError("a cell's values are no object")
    except OSError as error:
        raise UserError(f"no sweep at {folder}: {SWEEP} cannot be read; see dualsm.sweep") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no file of dualsm.sweep: {_reason(error)}") from error
    return sweep


def cell_row(workdir: Path, name: str, values: dict) -> Row:
    """The row of one cell; see `collect`.

    Args:
      workdir: the cell's run directory; it need not exist.
      name: of the cell.
      values: swept key -> the value that the cell sets, or None; its config, once written, has the last word.
    """
    row = {"name": name, "status": "missing", "reason": None}
    row |= {"repetitions": None, "alpha": None, "seed": None} | values
    config_columns = functools.partial(_config_columns, keys=values.keys() - {"alpha"})
    for read in (_outcome, config_columns, _loss_columns, _evaluation_columns):
        try:
            row |= read(workdir, row)
        except _DAMAGE as error:
            return row | {"status": "damaged", "reason": _reason(error)}
    return row


def curve(workdir: str | Path, metric: str) -> tuple[list[float], list[float]]:
    """Tokens seen and the values of a metric along a run; ([], []) when there are none."""
    try:
        records = [r for r in read_metrics(workdir) if _number(r.get(metric)) is not None]
        return [float(r["tokens"]) for r in records], [float(r[metric]) for r in records]
    except _DAMAGE:
        return [], []


def read_outcome(workdir: Path) -> dict | None:
    """What the sweep said of a cell in its `cell.json`: `status`, `reason`, `seconds`; None while it has not.

    Raises:
      ValueError: when the file is damaged.
    """
    path = workdir / CELL
    if not path.exists():
        return None
    outcome = _read_object(path)
    if outcome.get("status") not in STATUSES[:3]:
        raise ValueError(f"{CELL}: unknown status {outcome.get('status')!r}")
    return outcome | {"seconds": _number(outcome.get("seconds"))}


def _outcome(workdir: Path, row: Row) -> Row:
    """What the sweep said of the cell, or what its files say while it has not."""
    outcome = read_outcome(workdir)
    if outcome is None:
        metrics = workdir / METRICS
        return {"status": "running" if metrics.exists() and metrics.stat().st_size else "missing"}
    reason = outcome.get("reason")
    return {
        "status": outcome["status"],
        "reason": " ".join(str(reason).split()) if reason else None,
        "seconds": outcome["seconds"],
    }


def _config_columns(workdir: Path, row: Row, keys: Iterable[str]) -> Row:
    path = workdir / CONFIG
    if not path.exists():
        if row["status"] in ("done", "running"):
            raise ValueError(f"{CONFIG} is missing")
        return {}
    config = _read_object(path)
    repetitions, *sizes = (_count(config, key) for key in ("repetitions", "steps", "batch_size", "seq_len"))
    budget = math.prod(sizes)
    return {key: _config_value(config, key, row[key]) for key in keys} | {
        "repetitions": repetitions,
        "alpha": causal_share(config),
        "seed": config["seed"],
        "budget_tokens": budget,
        "unique_tokens": -(-budget // repetitions),
        "parameters": _parameters(json.dumps(config["model"])),
    }


def _config_value(config: dict, key: str, default: Any) -> Any:
    """The value at a key such as "optimizer.learning_rate", or `default`."""
    for name in key.split("."):
        if not isinstance(config, dict) or name not in config:
            return default
        config = config[name]
    return config


def causal_share(config: dict) -> float | None:
    """alpha of a run: its share of causal rows, where all others are masked diffusion; else None.

    Runs whose mixture changes on the way have no one alpha.
    """
    if config.get("mixture_schedule", {}).get("name", "constant") != "constant":
        return None
    mixture = config["mixture"]
    causal, masked = float(mixture.get("causal", 0)), float(mixture.get("masked_diffusion", 0))
    return causal if abs(causal + masked - 1) < 1e-6 else None


@functools.lru_cache(maxsize=64)
def _parameters(model: str) -> int:
    """Number of weights of a model; `model` is `config.model` as JSON."""
    # Only a folder of runs needs JAX; a table that was collected before does not.
    import jax

    from dualsm.config import load_config
    from dualsm.model.transformer import init_params

    shapes = jax.eval_shape(lambda: init_params(load_config(model), jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _loss_columns(workdir: Path, row: Row) -> Row:
    records = read_metrics(workdir)
    columns = {"step": records[-1]["step"]} if records else {}
    names = dict.fromkeys(name for record in records for name in record)
    for name in names:
        kind, _, rest = name.partition("/")
        series = [(r["step"], r[name]) for r in records if _number(r.get(name)) is not None]
        if not series or not rest.endswith("/loss"):
            continue
        if kind == "valid":
            step, best = min(series, key=lambda pair: pair[1])
            last = records[-1].get(name, series[-1][1])  # a run that ended in NaN has no final loss
            columns |= {name: _number(last), f"best/{rest}": best}
            columns[f"best/{rest.removesuffix('loss')}step"] = step
        elif kind == "train":
            late = [loss for step, loss in series if step > series[-1][0] * (1 - FINAL_SHARE)]
            columns[name] = sum(late) / len(late)
    return columns


def _evaluation_columns(workdir: Path, row: Row) -> Row:
    """Of all files in `eval/`, those of later checkpoints first in rank."""
    results = [_read_object(path) for path in sorted((workdir / "eval").glob("*.json"))]
    columns = {}
    for result in sorted(results, key=lambda result: result.get("checkpoint", 0)):
        for task, modes in result.get("tasks", {}).items():
            columns |= {f"task/{task}/{mode}": _number(m["normalised"]) for mode, m in modes.items()}
        for objective, measured in result.get("held_out", {}).items():
            columns[f"held_out/{objective}/loss"] = _number(measured["nats_per_token"])
    return columns


def _add_task_means(rows: list[Row]) -> None:
    """A mean over fewer tasks than another cell's could not be compared with it, so there is none."""
    names = {name for row in rows for name in row if name.startswith("task/")}
    for mode in sorted({name.split("/")[-1] for name in names}):
        columns = sorted(name for name in names if name.split("/")[-1] == mode)
        for row in rows:
            scores = [row[name] for name in columns if row.get(name) is not None]
            if len(scores) == len(columns):
                row[f"task/mean/{mode}"] = sum(scores) / len(scores)


def _read_object(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: not an object")
    return content


def _count(config: dict, key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{CONFIG}: {key}={value!r} is no positive whole number")
    return value


def _number(value) -> float | None:
    """A finite number as it is; None for anything else."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def _reason(error: BaseException) -> str:
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split()) or type(error).__name__
