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
OBJECTIVES = ("causal", "masked_diffusion", "masked")
PAIRS = [
    *((model, "before") for model in MODELS[1:4]),
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
    """Returns the differences of losses between models, with standard errors over paired sequences."""
    losses = {model: json.loads((folder / model / "losses.json").read_text())["losses"] for model in MODELS}
    lines = []
    for first, second in PAIRS:
        for name in losses[first]:
            a, b = losses[first][name], losses[second][name]
            assert a["tokens"] == b["tokens"], "the models were scored on other sequences or masks"
            tokens_V = np.array(a["tokens"])
            delta_V = np.array(a["nll"]) - np.array(b["nll"])
            mean, size = delta_V.sum() / tokens_V.sum(), len(delta_V)
            residual_V = delta_V - mean * tokens_V
            stderr = np.sqrt((residual_V**2).sum() * size / (size - 1)) / tokens_V.sum()
            lines.append(
                {"first": first, "second": second, "loss": name, "difference": mean, "stderr": stderr}
            )
    return pd.DataFrame(lines, columns=["first", "second", "loss", "difference", "stderr"])


def main(folder: Path) -> None:
    for function in (curves, scores, differences):
        path = HERE / f"{function.__name__}.csv"
        function(folder).to_csv(path, index=False, float_format="%.5g")
        print(f"{path}\n{pd.read_csv(path).to_string(index=False)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
