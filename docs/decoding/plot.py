"""Plots the acceptance of drafts: acceptance.csv as acceptance.png, tail.csv as tail.png.

Prints the correlation of acceptance with the masked loss.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dualsm.analysis.plots import new_figure
from dualsm.analysis.scales import alpha_scale, fraction

HERE = Path(__file__).parent
DRAFT = 8
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
LINES = {"sampled": ("-", "temperature 1"), "greedy": (":", "greedy")}


def main() -> None:
    plot_acceptance()
    plot_tail()


def plot_acceptance() -> None:
    """Plots acceptance against the share of causal sequences and against the tokens per draft."""
    table = pd.read_csv(HERE / "acceptance.csv")
    for sampling, rows in table[table.draft == DRAFT].groupby("sampling"):
        correlation = rows.accepted.corr(rows.masked_loss)
        print(f"{sampling}: correlation of acceptance and masked loss {correlation:.2f}, {len(rows)} models")
    most = table.repetitions.max()
    figure = new_figure(10, 5.2)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, table[table.draft == DRAFT], "repetitions", "alpha", alpha_scale, "R = {:.0f}".format)
    _draw(
        right,
        table[table.repetitions == most],
        "alpha",
        "draft",
        lambda draft: draft,
        lambda alpha: f"alpha {fraction(alpha)}",
    )
    alphas = sorted(table.alpha.unique())
    left.set_xticks([alpha_scale(alpha) for alpha in alphas], [fraction(alpha) for alpha in alphas])
    left.set(xlabel="share of causal sequences, alpha", title=f"K = {DRAFT} tokens per draft")
    left.set_ylabel("accepted tokens per draft")
    drafts = sorted(table.draft.unique())
    right.set_xscale("log", base=2)
    right.set_xticks(drafts, [str(draft) for draft in drafts])
    right.set(xlabel="tokens per draft, K", title=f"R = {most}")
    figure.savefig(HERE / "acceptance.png")


def plot_tail() -> None:
    """Plots acceptance and held-out losses against the share of `tail` sequences, with loss weight 1."""
    table = pd.read_csv(HERE / "tail.csv")
    table = table[table.weight == 1]
    percent = 100 * table.share
    figure = new_figure(10, 3.6)
    left, right = figure.subplots(1, 2)
    for (sampling, (style, name)), color in zip(LINES.items(), COLORS, strict=False):
        left.errorbar(
            percent, table[sampling], table[f"{sampling}_stderr"], color=color, linestyle=style, marker="o",
            markersize=4, capsize=2, label=name,
        )  # fmt: skip
    left.set(ylabel="accepted tokens per draft", title=f"K = {DRAFT} tokens per draft")
    for column, name, color in zip(
        ("causal_loss", "masked_loss"), ("causal", "masked"), COLORS[2:], strict=True
    ):
        rise = table[column] - table[column].iloc[0]
        right.plot(percent, rise, color=color, marker="o", markersize=4, label=name)
    right.set(ylabel="change, nats per token", title="held-out losses")
    for axes in (left, right):
        axes.set_xlabel("tail sequences, percent")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "tail.png")


def _draw(axes, table, color, x, scale, label) -> None:
    """Draws a line per value of column `color` and sampling, over column `x`."""
    groups = sorted(table[color].unique())
    for value, shade in zip(groups, COLORS, strict=False):
        for sampling, (style, name) in LINES.items():
            rows = table[(table[color] == value) & (table.sampling == sampling)].sort_values(x)
            positions = [scale(position) for position in rows[x]]
            axes.errorbar(
                positions, rows.accepted, rows.stderr, color=shade, linestyle=style, marker="o",
                markersize=4, capsize=2, label=f"{label(value)}, {name}",
            )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
