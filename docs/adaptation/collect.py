"""Collects the results of the adaptation study in tables: curves.csv, scores.csv and differences.csv.

    python docs/adaptation/collect.py runs/adaptation

The folder has one folder per model, `before`, `mixture`, `causal`, `masked` and `random`, each with
`metrics.jsonl` of the run, `losses.json` of benchmarks/masked_fractions.py, and `blimp.json` and
`hellaswag.json` of `dualsm evaluate`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
MODELS = ("before", "mixture", "causal", "masked", "random")
OBJECTIVES = ("causal", "masked_diffusion")
MASKED = "masked at 0.15"
COLUMNS = ("first", "first_loss", "second", "second_loss", "difference", "stderr")
PAIRS = [
    *((model, "before") for model in MODELS[1:4]),
    ("mixture", "random"),
    ("mixture", "causal"),
    ("mixture", "masked"),
    ("causal", "masked"),
]


def curves(folder: Path) -> pd.DataFrame:
    """Returns the held-out losses of the runs during training."""
    lines = []
    for model in MODELS[1:]:
        for text in (folder / model / "metrics.jsonl").read_text().splitlines():
            record = json.loads(text)
            losses = {name: record.get(f"valid/{name}/loss") for name in OBJECTIVES}
            if None not in losses.values():
                lines.append({"model": model, "step": record["step"], "tokens": record["tokens"]} | losses)
    return pd.DataFrame(lines)


def scores(folder: Path) -> pd.DataFrame:
    """Returns all scores of the models with their standard errors."""
    lines = []

    def add(model, metric, value, stderr=None, n=None):
        lines.append({"model": model, "metric": metric, "value": value, "stderr": stderr, "n": n})

    for model in MODELS:
        for name, loss in json.loads((folder / model / "losses.json").read_text())["losses"].items():
            add(model, f"{name}, nats per token", loss["nats_per_token"], loss["stderr"], len(loss["nll"]))
        results = {}
        for name in ("blimp", "hellaswag"):
            found = json.loads((folder / model / f"{name}.json").read_text())
            results |= found["tasks"]
            for objective, result in found.get("held_out", {}).items():
                add(model, f"{objective}, bits per byte", result["bits_per_byte"], None, result["n"])
        for task, modes in results.items():
            for mode, result in modes.items():
                add(model, f"{task}, {mode}", result["score"], result["stderr"], result["n"])
    return pd.DataFrame(lines)


def differences(folder: Path) -> pd.DataFrame:
    """Returns differences of losses between models and, within a model, between masked and causal tokens.

    Standard errors are over sequences: each sequence is one pair.
    """
    losses = {model: json.loads((folder / model / "losses.json").read_text())["losses"] for model in MODELS}
    lines = []

    def add(first, first_loss, second, second_loss):
        a, b = losses[first][first_loss], losses[second][second_loss]
        residual_V = residuals(a) - residuals(b)
        size = len(residual_V)
        difference = a["nats_per_token"] - b["nats_per_token"]
        stderr = np.sqrt((residual_V**2).sum() * size / (size - 1))
        lines.append(
            dict(zip(COLUMNS, (first, first_loss, second, second_loss, difference, stderr), strict=True))
        )

    for first, second in PAIRS:
        for name in losses[first]:
            assert losses[first][name]["tokens"] == losses[second][name]["tokens"], "other sequences or masks"
            add(first, name, second, name)
    for model in MODELS:
        add(model, MASKED, model, "causal")
    for model in ("mixture", "masked"):
        add(model, MASKED, "causal", "causal")
    return pd.DataFrame(lines)


def residuals(loss: dict) -> np.ndarray:
    """Returns the effect of each sequence on the loss, whose squares add up to the squared standard error."""
    nll_V, tokens_V = np.array(loss["nll"]), np.array(loss["tokens"])
    return (nll_V - loss["nats_per_token"] * tokens_V) / tokens_V.sum()


def main(folder: Path) -> None:
    for function in (curves, scores, differences):
        path = HERE / f"{function.__name__}.csv"
        function(folder).to_csv(path, index=False, float_format="%.5g")
        print(f"{path}\n{pd.read_csv(path).to_string(index=False)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
