"""Collects the held-out losses of the runs with two sources in two_sources.csv, and prints their means.

    python docs/reproduction/two_sources_scores.py runs/two_sources

The folder contains one run per mixture of two_sources.py and seed, named MIXTURE-SEED, with the results of
`dualsm evaluate`. Losses are in nats per token, on the whole held-out text of each source.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from results_folder import collect

TABLE = Path(__file__).with_name("two_sources.csv")
SOURCES, OBJECTIVES = ("literature", "other"), ("causal", "masked_diffusion")
MIXTURES = ("causal", "one", "per_source")


def read_scores(paths: Iterable[Path]) -> pd.DataFrame:
    """Returns a line per run: mixture, seed, and the losses of each source and objective."""
    lines = []
    for path in paths:
        mixture, _, seed = path.parents[1].name.rpartition("-")
        held_out = json.loads(path.read_text())["held_out"]
        losses = {
            f"{source}_{objective}": held_out[f"{source}/{objective}"]["nats_per_token"]
            for source in SOURCES
            for objective in OBJECTIVES
        }
        lines.append({"mixture": mixture, "seed": int(seed)} | losses)
    return pd.DataFrame(lines)


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the mean over seeds and half of their range, as text, by mixture."""
    losses = table.drop(columns="seed").groupby("mixture")
    middle, half = losses.mean(), (losses.max() - losses.min()) / 2
    text = {
        name: [f"{m:.3f} ± {h:.3f}" for m, h in zip(middle[name], half[name], strict=True)] for name in middle
    }
    return pd.DataFrame(text, index=middle.index).loc[list(MIXTURES)]


if __name__ == "__main__":
    collect(__doc__, "*-*/eval/step_*.json", {TABLE: read_scores}, "%.4f")
    print(means(pd.read_csv(TABLE)).to_string())
