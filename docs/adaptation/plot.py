"""Plots the held-out losses of the adaptation study: reads curves.csv, writes curves.png."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dualsm.analysis.plots import new_figure

HERE = Path(__file__).parent
COLORS = {"mixture": "#0072b2", "causal": "#d55e00", "masked": "#009e73", "random": "#777777"}
LABELS = {
    "mixture": "75% causal, 25% masked diffusion",
    "causal": "causal only",
    "masked": "masked diffusion only",
    "random": "the same mixture from random weights",
}
TITLES = {
    "causal": "causal loss",
    "masked_diffusion": "masked-diffusion loss (NELBO)",
    "masked": "30% of tokens masked in spans",
}


def main() -> None:
    table = pd.read_csv(HERE / "curves.csv")
    figure = new_figure(11, 3.8)
    for axes, (name, title) in zip(figure.subplots(1, 3), TITLES.items(), strict=True):
        for model, rows in table.groupby("model", sort=False):
            axes.plot(rows.tokens / 1e6, rows[name], color=COLORS[model], label=LABELS[model], marker=".")
        axes.set(title=title, xlabel="training tokens, millions")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out nats per token")
    figure.axes[1].legend(fontsize=8)
    figure.savefig(HERE / "curves.png")


if __name__ == "__main__":
    main()
