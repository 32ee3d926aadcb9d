"""Collects the results of a sweep: one record per cell, finished or not."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from dualsm.config import default_config, load_config
from dualsm.model.transformer import init_params
from dualsm.objectives.plan import count_sequences
from dualsm.process.errors import UserError
from dualsm.process.paths import size_and_time, user_path
from dualsm.rundir.metrics import METRICS, read_metrics
from dualsm.rundir.workdir import CONFIG
from dualsm.sweeps.cell_files import Record, number, read_object
from dualsm.sweeps.evaluation_columns import evaluation_columns

SWEEP, CELLS, CELL = "sweep.json", "cells", "cell.json"
# A sweep records the first four in `cell.json`: "running" if it was stopped before the cell ended. Without
# `cell.json`, "running" follows from the state of the folder, as the last two always do.
STATUSES = ("done", "failed", "diverged", "running", "missing", "damaged")
FINAL_SHARE = 1 / 20  # the final training loss is a mean over this last share of the run

# Exceptions that reading a truncated, edited or foreign file raises.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, UserError)


def collect(folder: epath.PathLike) -> list[Record]:
    """Returns one record per cell of a sweep, finished or not, in the order of `sweep.json`.

    The keys are `name`, `status`, `reason`, `repetitions`, `alpha`, `seed`, each config key that any
    cell sets (with the value of the cell's own config, which may be the default), `budget_tokens`,
    `unique_tokens`, `parameters`, `seconds` (of all sessions), `step` and `flops` (of the last log line), and

    - `valid/<objective>/loss`: last held-out loss, in nats per token;
    - `best/<objective>/loss`, `best/<objective>/step`: lowest held-out loss of the run, and its step;
    - `train/<objective>/loss`: mean over the log lines of the last twentieth of the run, weighted by their
      numbers of steps;
    - `held_out/<objective>/loss`, `held_out/<objective>/stderr`: held-out loss from `dualsm.evaluate`, and
      its standard error over documents; `held_out/<objective>/<domain>/...`: the same of each domain;
    - `acceptance/greedy`, `acceptance/sampled`: accepted tokens per draft from `dualsm.evaluate`, and
      `acceptance/<sampling>/stderr`: its standard error over segments;
    - `infilling/accuracy`, `infilling/stderr`, `infilling/bits_per_byte`: infilling of single words;
    - `task/<task>/<mode>`: score, scaled to 0 for chance and 100 for perfect;
    - `answer/<task>/<mode>/bits_per_byte`: bits per byte of the correct answers;
    - `task/mean/<mode>`: mean score of a cell that has a score for every task of the sweep.

    Unknown values are None. A cell that cannot be read has the status "damaged".

    Raises:
      UserError: if the folder has no valid `sweep.json`.
    """
    cells = read_sweep(folder)["cells"]
    unset = dict.fromkeys(key for values in cells.values() for key in values)
    records = [
        cell_record(user_path(folder) / CELLS / name, name, unset | values) for name, values in cells.items()
    ]
    _add_task_means(records)
    return records


def read_sweep(folder: epath.PathLike) -> dict:
    """Reads `sweep.json`: `config`, `given`, `grid` and `cells` (name -> swept values).

    Raises:
      UserError: if the file is missing or invalid.
    """
    path = user_path(folder) / SWEEP
    try:
        sweep = json.loads(path.read_text())
        if not all(isinstance(values, dict) for values in sweep["cells"].values()):
            raise ValueError("the values of a cell are not an object")
    except OSError as error:
        raise UserError(
            f"no sweep at {folder}: cannot read {SWEEP}; pass the --workdir of dualsm.sweep"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a file of dualsm.sweep: {_reason(error)}") from error
    return sweep


def cell_record(workdir: epath.Path, name: str, values: dict) -> Record:
    """Returns the record of one cell; see `collect`.

    Args:
      workdir: the cell's run directory, which may not exist.
      name: name of the cell.
      values: swept key -> value that the cell sets, or None. The cell's config takes precedence.
    """
    record = {"name": name, "status": "missing", "reason": None}
    record |= {"repetitions": None, "alpha": None, "seed": None} | values
    config_columns = functools.partial(_config_columns, keys=values.keys() - {"alpha"})
    evaluation = lambda workdir, _: evaluation_columns(workdir)  # noqa: E731
    for read in (_outcome, config_columns, _loss_columns, evaluation):
        try:
            record |= read(workdir, record)
        except _DAMAGE as error:
            return record | {"status": "damaged", "reason": _reason(error)}
    return record


def read_curve(workdir: epath.PathLike, metric: str, cost: str = "tokens") -> tuple[list[float], list[float]]:
    """Returns the values of a metric during a run, with the cost so far; ([], []) if there are none.

    Args:
      workdir: run directory.
      metric: name of the metric.
      cost: "tokens" for the tokens seen, or "flops".

    Returns:
      The costs and the values.
    """
    try:
        records = [
            r for r in read_metrics(workdir) if None not in (number(r.get(metric)), number(r.get(cost)))
        ]
        return [float(r[cost]) for r in records], [float(r[metric]) for r in records]
    except _DAMAGE:
        return [], []


def read_outcome(workdir: epath.Path) -> dict | None:
    """Reads `status`, `reason` and `seconds` from a cell's `cell.json`; None if the file does not exist.

    Raises:
      ValueError: if the file is damaged.
    """
    path = workdir / CELL
    if not path.exists():
        return None
    outcome = read_object(path)
    if outcome.get("status") not in STATUSES[:4]:
        raise ValueError(f"{CELL}: unknown status {outcome.get('status')!r}")
    return outcome | {"seconds": number(outcome.get("seconds"))}


def _outcome(workdir: epath.Path, record: Record) -> Record:
    """Returns the outcome in `cell.json`, or the status that follows from the other files."""
    outcome = read_outcome(workdir)
    if outcome is None:
        metrics = workdir / METRICS
        return {"status": "running" if metrics.exists() and size_and_time(metrics)[0] else "missing"}
    reason = outcome.get("reason")
    return {
        "status": outcome["status"],
        "reason": " ".join(str(reason).split()) if reason else None,
        "seconds": outcome["seconds"],
    }


def _config_columns(workdir: epath.Path, record: Record, keys: Iterable[str]) -> Record:
    path = workdir / CONFIG
    if not path.exists():
        if record["status"] in ("done", "running"):
            raise ValueError(f"{CONFIG} is missing")
        return {}
    config = read_object(path)
    repetitions, budget = _count(config, "repetitions"), _budget_tokens(config)
    if config.get("sources"):  # each source has its own R
        repetitions = None
    return {key: _config_value(config, key, record[key]) for key in keys} | {
        "repetitions": repetitions,
        "alpha": causal_share(config),
        "seed": config["seed"],
        "budget_tokens": budget,
        "unique_tokens": -(-budget // repetitions) if repetitions else None,
        "parameters": _parameters(json.dumps(config["model"])),
    }


def _budget_tokens(config: dict) -> int:
    """Returns the training tokens of a run; the two rows of a pair's sequence count once."""
    steps, batch_size, seq_len = (_count(config, key) for key in ("steps", "batch_size", "seq_len"))
    path = config.get("mixture_schedule", {}).get("path", "")
    pairs = config.get("pairs", {})
    if not config.get("sources") and not any(config["mixture"].get(name) or name in path for name in pairs):
        return steps * batch_size * seq_len
    complete = default_config()
    complete.update(config)
    return count_sequences(complete) * seq_len


def _config_value(config: dict, key: str, default: Any) -> Any:
    """Returns the value at a dotted key such as "optimizer.learning_rate", or `default`."""
    for name in key.split("."):
        if not isinstance(config, dict) or name not in config:
            return default
        config = config[name]
    return config


def causal_share(config: dict) -> float | None:
    """Returns alpha, the share of causal rows, if all other rows are masked diffusion; else None.

    A run whose mixture changes during training, or differs between sources, has no single alpha.
    """
    if config.get("mixture_schedule", {}).get("name", "constant") != "constant":
        return None
    if any(any(source.get("mixture", {}).values()) for source in config.get("sources", {}).values()):
        return None
    mixture = config["mixture"]
    causal, masked = float(mixture.get("causal", 0)), float(mixture.get("masked_diffusion", 0))
    return causal if abs(causal + masked - 1) < 1e-6 else None


@functools.lru_cache(maxsize=64)
def _parameters(model: str) -> int:
    """Returns the number of parameters of a model, given `config.model` as JSON."""
    shapes = jax.eval_shape(lambda: init_params(load_config(model), jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _loss_columns(workdir: epath.Path, record: Record) -> Record:
    records = read_metrics(workdir)
    columns = {"step": records[-1]["step"], "flops": number(records[-1].get("flops"))} if records else {}
    names = dict.fromkeys(name for record in records for name in record)
    covered = _steps_covered(records)
    for name in names:
        kind, _, rest = name.partition("/")
        series = [(r["step"], r[name]) for r in records if number(r.get(name)) is not None]
        if not series or not rest.endswith("/loss"):
            continue
        if kind == "valid":
            step, best = min(series, key=lambda pair: pair[1])
            last = records[-1].get(name, series[-1][1])  # a run that ends in NaN has no final loss
            columns |= {name: number(last), f"best/{rest}": best}
            columns[f"best/{rest.removesuffix('loss')}step"] = step
        elif kind == "train":
            late = [(step, loss) for step, loss in series if step > series[-1][0] * (1 - FINAL_SHARE)]
            total = sum(covered[step] for step, _ in late)
            columns[name] = sum(covered[step] * loss for step, loss in late) / total
    return columns


def _steps_covered(records: list[Record]) -> dict[int, int]:
    """Returns the number of steps that the training losses of each log line are a mean over, by its step."""
    steps = [record["step"] for record in records if any(name.startswith("train/") for name in record)]
    validated = records[0]["step"] if records else 0  # a fork starts at the step of its first validation
    if steps and validated == steps[0]:  # without validation, assume that the first two lines cover the same
        validated = max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0
    return dict(zip(steps, np.maximum(np.diff([validated, *steps]), 1).tolist(), strict=True))


def _add_task_means(records: list[Record]) -> None:
    """Adds mean scores to the records with all tasks; means over different tasks are not comparable."""
    names = {name for record in records for name in record if name.startswith("task/")}
    for mode in sorted({name.split("/")[-1] for name in names}):
        columns = sorted(name for name in names if name.split("/")[-1] == mode)
        for record in records:
            scores = [record[name] for name in columns if record.get(name) is not None]
            if len(scores) == len(columns):
                record[f"task/mean/{mode}"] = sum(scores) / len(scores)


def _count(config: dict, key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{CONFIG}: {key}={value!r} is not a positive integer")
    return value


def _reason(error: BaseException) -> str:
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split()) or type(error).__name__
