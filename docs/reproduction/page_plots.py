"""Plots of docs/reproduction.md."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from page_tables import method_cells, share
from selection import CELL, Chosen


def plot_curves(curves: pd.DataFrame, runs: pd.DataFrame, path: Path) -> None:
    """Plots held-out losses over training at R = 128 of causal training and the mixture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = Chosen(runs)
    mixture, finer = chosen.mixture(128, "full"), method_cells(chosen)["causal finer"]
    cells = [
        ("causal", "#c44e52", "-", chosen.best("plain", 128, 1.0, "full")),
        (f"causal, weight decay {finer['weight_decay']:g}", "#8c6bb1", "--", finer),
        ("causal, stopped early", "#dd9b5f", "-", chosen.best("plain", 128, 1.0, "stop")),
        (f"mixture (alpha {share(mixture['alpha'])})", "#3b6fb5", "-", mixture),
    ]
    figure, axes = plt.subplots(2, 1, figsize=(7, 6.4), sharex=True, layout="constrained")
    for label, colour, style, cell in cells:
        found = curves
        for key in CELL:
            found = found[found[key] == cell[key]]
        for axis, column in zip(axes, ("causal", "masked_diffusion"), strict=True):
            by_step = found.groupby("step")[column].agg(["mean", "min", "max"])
            tokens = by_step.index * 64 * 128 / 1e6
            axis.fill_between(tokens, by_step["min"], by_step["max"], color=colour, alpha=0.25, linewidth=0)
            axis.plot(tokens, by_step["mean"], style, color=colour, label=label, linewidth=2)
            axis.plot(tokens[-1:], by_step["mean"].iloc[-1:], "o", color=colour)
    axes[0].set_ylim(3.05, 4.0)
    axes[0].set_ylabel("held-out causal loss\n(nats per token)")
    axes[1].set_ylabel("held-out masked-diffusion loss\n(nats per token)")
    axes[1].set_ylim(3.9, 6.2)
    axes[1].set_xlabel("million training tokens (117,760 unique tokens, repeated up to 128 times)")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def plot_lengths(runs: pd.DataFrame, path: Path) -> None:
    """Plots the tuning runs at R = 128: causal loss by length, with the best weight decay, for each alpha."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tuned = runs[(runs.stage == "tune") & (runs.R == 128)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    alphas = sorted(tuned.alpha.unique())
    colours = plt.get_cmap("viridis")
    for index, alpha in enumerate(alphas):
        found = tuned[tuned.alpha == alpha]
        best = found.loc[found.groupby("length").dev_causal.idxmin()].sort_values("length")
        style = {"color": colours(index / len(alphas)), "marker": "o", "markersize": 4}
        label = f"alpha {share(alpha)}"
        axes[0].plot(128 * best.length, best.dev_causal, label=label, **style)
        axes[1].plot(128 * best.length, best.dev_masked_diffusion, label=label, **style)
    for axis, name in zip(axes, ("causal", "masked-diffusion"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
        axis.set_xlabel("repetitions of the run")
        axis.set_ylabel(f"{name} loss (nats per token)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
