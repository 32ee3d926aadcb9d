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
    "random": "75% / 25% from random weights",
}
TITLES = {
    "causal": "causal loss",
    "masked_diffusion": "masked-diffusion loss (NELBO)",
}
LIMITS = {"causal": (2.9, 3.6), "masked_diffusion": (4, 8.2)}


def main() -> None:
    table = pd.read_csv(HERE / "curves.csv")
    figure = new_figure(10, 4.4)
    all_axes = figure.subplots(1, 2)
    for axes, (name, title) in zip(all_axes, TITLES.items(), strict=True):
        for model, rows in table.groupby("model", sort=False):
            axes.plot(rows.tokens / 1e6, rows[name], color=COLORS[model], label=LABELS[model], marker=".")
            if rows[name].min() > LIMITS[name][1]:
                text = f"from random weights: from {rows[name].iloc[0]:.1f} to {rows[name].iloc[-1]:.2f}"
                axes.text(0.5, 0.97, text, transform=axes.transAxes, ha="center", va="top", color="0.45")
        axes.set(title=title, xlabel="training tokens, millions", ylim=LIMITS[name])
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("held-out nats per token")
    figure.legend(
        *all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(HERE / "curves.png")


if __name__ == "__main__":
    main()
