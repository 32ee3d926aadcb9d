"""Synthetic sweeps: folders in the layout of `dualsm.sweep`, with losses from a formula."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dualsm.sweeps.grid import apply
from tests.micro import micro_config

STEPS, BATCH_SIZE, SEQ_LEN = 512, 32, 64
BUDGET = STEPS * BATCH_SIZE * SEQ_LEN


def held_out_loss(repetitions: float, alpha: float, tokens, budget: float = BUDGET) -> dict[str, np.ndarray]:
    """Returns the losses after `tokens` of a run, in the pattern of the paper.

    Each objective overfits data that it has seen more than 16 (causal) or 256 (masked) times, and learns more
    slowly with fewer rows.
    """
    passes = repetitions * np.asarray(tokens) / budget
    learned = 2.5 * (np.asarray(tokens) / BUDGET + 0.01) ** -0.15
    losses = {}
    for name, share, max_passes in (("causal", alpha, 16), ("masked_diffusion", 1 - alpha, 256)):
        slower = 0.12 * np.log2(1 / (share + 0.05))
        seen = np.log2(np.maximum(passes * share, 1e-9) / max_passes)
        losses[name] = learned + slower + 0.35 * np.log1p(np.exp(2 * seen)) + 0.02 * np.log2(repetitions)
    losses["masked_diffusion"] = losses["masked_diffusion"] + 0.5
    return losses


def write_cell(sweep: Path, values: dict, *, steps: int = STEPS, noise: float = 0.01, name: str = "") -> str:
    """Writes a finished cell into `sweep/cells` and returns its name."""
    name = name or ",".join(f"{key}={value:.6g}" for key, value in values.items())
    workdir = sweep / "cells" / name
    (workdir / "eval").mkdir(parents=True)
    alpha, repetitions, seed = values["alpha"], values["repetitions"], values.get("seed", 0)
    config = micro_config()
    config.steps, config.batch_size, config.seq_len = steps, BATCH_SIZE, SEQ_LEN
    config.repetitions, config.seed, config.model.vocab_size = repetitions, seed, 512
    config.mixture.causal, config.mixture.prefix, config.mixture.masked_diffusion = alpha, 0.0, 1 - alpha
    config = apply(config, {key: value for key, value in values.items() if "." in key})
    (workdir / "config.json").write_text(config.to_json())
    lines = _lines(repetitions, alpha, steps, noise, np.random.default_rng(seed))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = 30 - 4 * lines[-1]["valid/causal/loss"]
    tasks = {"blimp": {"causal": {"normalised": score}}, "piqa": {"causal": {"normalised": score - 5}}}
    (workdir / "eval" / f"step_{steps}.json").write_text(json.dumps({"checkpoint": steps, "tasks": tasks}))
    (workdir / "cell.json").write_text(json.dumps({"status": "done", "reason": "", "seconds": 12.5}))
    return name


def _lines(repetitions, alpha, steps, noise, random) -> list[dict]:
    budget = steps * BATCH_SIZE * SEQ_LEN
    lines = []
    for step in range(0, steps + 1, steps // 16):
        tokens = step * BATCH_SIZE * SEQ_LEN
        line = {"step": step, "tokens": tokens, "epoch": tokens / budget * repetitions, "flops": 1e6 * tokens}
        for objective, loss in held_out_loss(repetitions, alpha, tokens, budget).items():
            share = alpha if objective == "causal" else 1 - alpha
            line[f"valid/{objective}/loss"] = float(loss) + noise * random.standard_normal()
            if share and step:
                line[f"train/{objective}/loss"] = float(loss) - 0.02 * line["epoch"] * share
        lines.append(line)
    return lines


def write_sweep(sweep: Path, cells: list[dict], missing: tuple[str, ...] = (), **options) -> Path:
    """Writes the folder of a sweep with a finished cell for each dict of values."""
    names = {write_cell(sweep, values, **options): values for values in cells}
    write_plan(sweep, names | {name: {"repetitions": 1, "alpha": 1.0} for name in missing})
    return sweep


def write_plan(sweep: Path, cells: dict[str, dict]) -> None:
    """Writes `sweep.json`."""
    sweep.mkdir(parents=True, exist_ok=True)
    (sweep / "sweep.json").write_text(json.dumps({"config": "configs/x.py", "grid": {}, "cells": cells}))


def grid(repetitions, alphas) -> list[dict]:
    """Returns the values of the cells of a grid."""
    return [{"repetitions": r, "alpha": a} for r in repetitions for a in alphas]
