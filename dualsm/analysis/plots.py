"""The plots of a sweep: one function per plot, which draws arrays on the caller's axes.

Shape letters: A alphas and G repetitions of a grid, C cells. The color maps suit color-blind readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dualsm.analysis.analysis_errors import analysis_extra
from dualsm.analysis.scales import alpha_scale, fraction, repetition_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]  # tokens or FLOPs, loss
COSTS = {"tokens": ("tokens seen, millions", 1e6), "flops": ("training compute, PFLOP", 1e15)}

TICKS = (0, 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 3 / 4, 15 / 16, 63 / 64, 255 / 256, 1)
_MAP = "viridis"  # brighter colors are better
_ALPHA_LABEL = "share of causal rows, alpha"
_REPETITIONS_LABEL = "repetitions R of the unique tokens"


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of a size in inches, independent of pyplot's global state."""
    with analysis_extra():
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=130)


def plot_surface(
    axes: Axes,
    repetitions_G: np.ndarray,
    alpha_A: np.ndarray,
    score_AxG: np.ndarray,
    cells: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    unit: str,
    lower_is_better: bool,
) -> None:
    """Draws the surface as filled contours, with the tried cells and the best alpha of each R.

    Args:
      axes: axes to draw on.
      repetitions_G, alpha_A, score_AxG: grid of the surface and its scores.
      cells: R, alpha and score of each cell.
      unit: unit of the score.
      lower_is_better: True for a loss.
    """
    with analysis_extra():
        from matplotlib.patheffects import Normal, Stroke

    repetitions_C, alpha_C, score_C = map(np.asarray, cells)
    levels, extend = _levels(np.concatenate([score_AxG.ravel(), score_C]), lower_is_better)
    colors = {"cmap": _MAP + "_r" * lower_is_better, "vmin": levels[0], "vmax": levels[-1]}
    x_G, y_A = repetition_scale(repetitions_G), alpha_scale(alpha_A)
    filled = axes.contourf(x_G, y_A, score_AxG, levels, extend=extend, **colors)
    axes.contour(x_G, y_A, score_AxG, levels[::2], colors="white", linewidths=0.5, alpha=0.6)
    best_G = (score_AxG.argmin if lower_is_better else score_AxG.argmax)(axis=0)
    edge = [Stroke(linewidth=3.6, foreground="black"), Normal()]
    best = {"color": "white", "linewidth": 1.8, "path_effects": edge, "label": "best alpha of the surface"}
    axes.plot(x_G, y_A[best_G], **best)
    axes.scatter(
        repetition_scale(repetitions_C), alpha_scale(alpha_C), 46, score_C,
        edgecolors="black", linewidths=0.9, zorder=3, label="tried cells", clip_on=False, **colors,
    )  # fmt: skip
    bar = axes.figure.colorbar(filled, ax=axes, pad=0.02)
    bar.set_label(f"{unit} (bright is better)")
    _repetition_axis(axes, np.unique(repetitions_C))
    _alpha_axis(axes, np.unique(alpha_C))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def plot_best_alpha(
    axes: Axes,
    repetitions_G: np.ndarray,
    alpha_A: np.ndarray,
    probability_AxG: np.ndarray,
    intervals_G: Sequence[tuple[float, float]],
    *,
    level: float,
) -> None:
    """Draws the probability that each alpha is the best, and a credible interval, by R.

    Args:
      axes: axes to draw on.
      repetitions_G, alpha_A: the grid, ascending and evenly spaced on the scales of the axes, so that
        colors are comparable.
      probability_AxG: each column sums to 1.
      intervals_G: lowest and highest alpha of each credible interval.
      level: probability of the intervals.
    """
    x_G, y_A = repetition_scale(repetitions_G), alpha_scale(alpha_A)
    mesh = axes.pcolormesh(_edges(x_G), _edges(y_A), probability_AxG, cmap="Blues", vmin=0, rasterized=True)
    low_G, high_G = alpha_scale(np.array(intervals_G).T)
    step = {"where": "mid", "color": "black", "linewidth": 1.2}
    axes.step(x_G, low_G, **step)
    axes.step(x_G, high_G, label=f"{level:.0%} credible interval of the best alpha", **step)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label("probability of being the best alpha")
    _repetition_axis(axes, _doublings(repetitions_G))
    _alpha_axis(axes, TICKS)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def plot_curves(
    figure: Figure,
    curves: Mapping[str, Mapping[float, Mapping[float, Sequence[Curve]]]],
    *,
    cost: str = "tokens",
    unit: str = "nats per token",
) -> None:
    """Draws held-out losses over tokens or FLOPs: one row per objective, one column per R, alpha as color.

    Args:
      figure: an empty figure.
      curves: objective -> R -> alpha -> one curve per seed.
      cost: quantity on the x axis, a key of `COSTS`.
      unit: unit of the losses.
    """
    with analysis_extra():
        from matplotlib import colormaps
        from matplotlib.lines import Line2D

    label, scale = COSTS[cost]
    columns = sorted({repetitions for panels in curves.values() for repetitions in panels})
    alphas = sorted({a for panels in curves.values() for lines in panels.values() for a in lines})
    color = dict(zip(alphas, colormaps["viridis"](np.linspace(0, 0.92, len(alphas))), strict=True))
    grid = figure.subplots(len(curves), len(columns), sharex=True, sharey="row", squeeze=False)
    for row, (objective, panels) in zip(grid, curves.items(), strict=True):
        for axes, repetitions in zip(row, columns, strict=True):
            for alpha, seeds in sorted(panels.get(repetitions, {}).items()):
                for costs, losses in seeds:
                    axes.plot(np.asarray(costs) / scale, losses, color=color[alpha], linewidth=1.4)
            axes.grid(alpha=0.25)
        row[0].set_ylabel(f"{objective} loss\n{unit}")
        row[0].set_ylim(
            *_loss_limits([line for lines in panels.values() for s in lines.values() for line in s])
        )
    for axes, repetitions in zip(grid[0], columns, strict=True):
        axes.set_title(f"R = {repetitions:g}")
    for axes in grid[-1]:
        axes.set_xlabel(label)
    handles = [Line2D([], [], color=color[a], linewidth=2, label=fraction(a)) for a in alphas]
    figure.legend(handles=handles, title="alpha", loc="outside right center", frameon=False)


def plot_gap(
    axes: Axes,
    repetitions_G: Sequence[float],
    alpha_A: Sequence[float],
    gap_AxG: np.ndarray,
    *,
    top: float,
    label: str,
) -> None:
    """Draws held-out minus training losses as a colored table by R and alpha; NaN is drawn as a dash.

    Args:
      axes: axes to draw on.
      repetitions_G, alpha_A: R of the columns and alpha of the rows, ascending.
      gap_AxG: the differences of the losses.
      top: gap at the end of the color scale.
      label: label of the color bar, with the unit.
    """
    axes.set_facecolor("0.9")
    image = axes.imshow(gap_AxG, cmap="Oranges", vmin=0, vmax=top, origin="lower", aspect="auto")
    for (row, column), gap in np.ndenumerate(gap_AxG):
        text = f"{gap:.2f}".replace("-0.00", "0.00") if np.isfinite(gap) else "\N{EN DASH}"
        color = "white" if gap > 0.7 * top else "black"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(repetitions_G)), [f"{r:g}" for r in repetitions_G])
    axes.set_yticks(range(len(alpha_A)), [fraction(a) for a in alpha_A])
    axes.set_xlabel(_REPETITIONS_LABEL)
    axes.set_ylabel(_ALPHA_LABEL)
    axes.figure.colorbar(image, ax=axes, pad=0.02, extend="max").set_label(label)


def _levels(score: np.ndarray, lower_is_better: bool) -> tuple[np.ndarray, str]:
    """Returns contour levels; much worse scores share the last color, so that the others stay distinct."""
    with analysis_extra():
        from matplotlib.ticker import MaxNLocator

    distance = np.sort(score - score.min() if lower_is_better else score.max() - score)
    reach = min(distance[-1], 2 * np.quantile(distance, 0.75)) or 1.0
    ends = (score.min(), score.min() + reach) if lower_is_better else (score.max() - reach, score.max())
    levels = MaxNLocator(14).tick_values(*ends)
    if reach == distance[-1]:
        return levels, "neither"
    return levels, "max" if lower_is_better else "min"


def _loss_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Returns y limits that include most final losses; curves of diverged runs may be clipped."""
    losses = [np.asarray(losses)[np.isfinite(losses)] for _, losses in curves]
    losses = [values for values in losses if len(values)]
    if not losses:
        return 0.0, 1.0
    low = min(values.min() for values in losses)
    ends = np.array([values[-1] for values in losses])
    high = low + 1.5 * (np.quantile(ends, 0.7) - low) + 0.2
    return low - 0.05 * (high - low), high


def _repetition_axis(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xticks(repetition_scale(ticks), [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(_REPETITIONS_LABEL)


def _alpha_axis(axes: Axes, ticks: Sequence[float]) -> None:
    low, high = sorted(axes.get_ylim())
    shown = [tick for tick in ticks if low <= alpha_scale(tick) <= high]
    axes.set_yticks(alpha_scale(shown), [fraction(tick) for tick in shown])
    axes.set_ylabel(_ALPHA_LABEL)


def _doublings(repetitions: np.ndarray) -> np.ndarray:
    """Returns the powers of two in the range of `repetitions`."""
    first, last = np.ceil(np.log2(min(repetitions))), np.floor(np.log2(max(repetitions)))
    return 2.0 ** np.arange(first, last + 1)


def _edges(center: np.ndarray) -> np.ndarray:
    """Returns cell edges halfway between the centers; the outer edges are at the outer centers."""
    middle = (center[1:] + center[:-1]) / 2
    return np.concatenate([center[:1], middle, center[-1:]])
