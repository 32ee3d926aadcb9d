"""Writes the report of a sweep into its folder: table, plots and a text summary."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from dualsm.analysis import plots
from dualsm.analysis.advice import fit_to_cells
from dualsm.analysis.analysis_errors import TooFewCells
from dualsm.analysis.scales import alpha_from_scale, alpha_scale, fraction, repetition_scale
from dualsm.analysis.surface import CREDIBLE, Surface
from dualsm.analysis.table import TABLE, comparable, drawable, load, lower_is_better, measures, write_table
from dualsm.process.output import write_atomically
from dualsm.process.paths import user_path
from dualsm.process.progress import say
from dualsm.process.progress import table as text_table
from dualsm.sweeps.cells import CELLS, read_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

GRID_REPETITIONS, GRID_ALPHAS = 41, 121  # size of the grid on which surfaces are drawn
OBJECTIVES = ("causal", "masked_diffusion")  # alpha divides the rows between these
PROBABILITY_ALPHAS = 37  # number of alphas in the plot of the best alpha, evenly spaced on the alpha scale


def report(folder: epath.PathLike, cost: str = "tokens") -> list[epath.Path]:
    """Writes `table.csv` and the plots of a sweep; prints a line for each plot that lacks cells.

    Args:
      folder: folder of the sweep.
      cost: x axis of the loss curves, "tokens" or "flops".

    Returns:
      The paths of the files; the table is the first.

    Raises:
      UserError: if the folder is not a sweep, or a package of the extra `analysis` is not installed.
    """
    folder = user_path(folder)
    table = load(folder)
    write_table(folder / TABLE, table)
    written = [folder / TABLE]

    def save(figure: Figure, name: str) -> None:
        content = io.BytesIO()
        figure.savefig(content, format="png")
        written.append(folder / f"{name}.png")
        write_atomically(written[-1], content.getvalue())

    for metric in plotted_metrics(table):
        try:
            cells = comparable(table, metric)
            surface = fit_to_cells(cells, metric)
            if len(set(surface.repetitions_C)) < 2:
                raise TooFewCells("a surface needs cells of at least 2 numbers of repetitions")
        except TooFewCells as error:
            say(f"no surface of {metric} yet: {error}")
            continue
        name = metric.replace("/", "_")
        save(surface_figure(surface, cells, metric), f"surface_{name}")
        save(best_alpha_figure(surface, cells, metric), f"best_alpha_{name}")
    draws = {
        "loss_curves": lambda: curves_figure(table, folder, cost),
        "gap": lambda: gap_figure(table, folder),
    }
    for name, draw in draws.items():
        try:
            save(draw(), name)
        except TooFewCells as error:
            say(f"no {name}.png yet: {error}")
    return written


def report_text(folder: epath.PathLike) -> str:
    """Returns the plotted metrics as text tables by alpha and R; "" if no cell has finished."""
    table = load(folder)
    return summary(table, plotted_metrics(table))


def summary(table: DataFrame, metrics: Sequence[str]) -> str:
    """Returns one text table per metric: a row per alpha, a column per R, "*" at the best alpha of each R."""
    parts = []
    for metric in metrics:
        try:
            scores = comparable(table, metric).pivot_table(metric, "alpha", "repetitions")
        except TooFewCells:
            continue
        best = scores.min() if lower_is_better(metric) else scores.max()
        lines = [
            [fraction(alpha), *(_score_text(score, score == best[r]) for r, score in row.items())]
            for alpha, row in scores.iterrows()
        ]
        parts.append(f"{metric}\n" + text_table(["alpha", *(f"R {r:g} " for r in scores)], lines))
    return "\n\n".join(parts)


def _score_text(score: float, is_best: bool) -> str:
    return "- " if np.isnan(score) else f"{score:.3f}{'*' if is_best else ' '}"


def plotted_metrics(table: DataFrame) -> list[str]:
    """Returns the metrics that are plotted as surfaces: held-out losses and mean task scores."""
    return [name for name in measures(table) if name.startswith(("valid/", "task/mean/"))]


def describe_metric(metric: str) -> tuple[str, str]:
    """Returns a description of a metric, and its unit."""
    kind, name, rest = metric.split("/", 2)
    if kind == "task":
        return f"{'mean task' if name == 'mean' else name} score in {rest} mode", "0 guessing, 100 perfect"
    if rest != "loss":  # valid/ema/<objective>/loss
        name = f"{rest.removesuffix('/loss')} ({name})"
    return f"held-out {name} loss", "nats per token"


def surface_figure(surface: Surface, cells: DataFrame, metric: str) -> Figure:
    """Draws the fitted surface and the tried cells."""
    repetitions_G = _repetition_grid(surface)
    alpha_A = _even_alphas(surface, GRID_ALPHAS)
    mean_AxG, _ = surface.grid(repetitions_G, alpha_A)
    figure = plots.new_figure(7.5, 5.2)
    axes = figure.subplots()
    plots.plot_surface(
        axes,
        repetitions_G,
        alpha_A,
        mean_AxG,
        (surface.repetitions_C, surface.alpha_C, cells[metric]),
        unit=describe_metric(metric)[1],
        lower_is_better=lower_is_better(metric),
    )
    axes.set_title(f"{describe_metric(metric)[0]} by repetition and mixture\n{_cells_text(cells)}")
    return figure


def best_alpha_figure(surface: Surface, cells: DataFrame, metric: str) -> Figure:
    """Draws the probability that each alpha is the best, by R."""
    repetitions_G = _repetition_grid(surface)
    alpha_A = _even_alphas(surface, PROBABILITY_ALPHAS)
    probability_AxG = np.stack([surface.probability_best(r, alpha_A) for r in repetitions_G], axis=1)
    intervals = [surface.recommend(r).interval for r in repetitions_G]
    figure = plots.new_figure(7.5, 5.2)
    axes = figure.subplots()
    plots.plot_best_alpha(axes, repetitions_G, alpha_A, probability_AxG, intervals, level=CREDIBLE)
    axes.set_title(f"which mixture is best for {describe_metric(metric)[0]}?\n{_cells_text(cells)}")
    return figure


def curves_figure(table: DataFrame, folder: epath.Path, cost: str) -> Figure:
    """Draws held-out losses over tokens or FLOPs. Raises `TooFewCells` if no cell has been validated."""
    curves = {}
    for objective in OBJECTIVES:
        metric = _held_out_metric(table, objective)
        panels = defaultdict(lambda: defaultdict(list))
        cells = drawable(table, metric)[["name", "repetitions", "alpha"]]
        for name, repetitions, alpha in cells.itertuples(index=False):
            costs, losses = read_curve(folder / CELLS / name, metric, cost)
            if len(costs) > 1:
                # The loss of the untrained model is the same for all cells and would compress the y axis.
                panels[repetitions][alpha].append((costs[1:], losses[1:]))
        if panels:
            curves[objective] = panels
    if not curves:
        if cost != "tokens":
            raise TooFewCells(
                f"no cell has log lines with {cost} and a held-out loss after its first step; runs of "
                f"earlier versions did not log {cost}, use --cost=tokens"
            )
        raise TooFewCells("no cell has a held-out loss after its first step")
    columns = len({repetitions for panels in curves.values() for repetitions in panels})
    figure = plots.new_figure(2.6 * columns + 1.6, 2.7 * len(curves) + 0.7)
    plots.plot_curves(figure, curves, cost=cost)
    figure.suptitle("held-out loss during training, by repetitions R")
    return figure


def gap_figure(table: DataFrame, folder: epath.Path) -> Figure:
    """Draws final held-out minus training losses. Raises `TooFewCells` if no cell has both."""
    tables = {objective: _gaps(table, objective) for objective in OBJECTIVES}
    tables = {objective: gaps for objective, gaps in tables.items() if gaps.size}
    if not tables:
        raise TooFewCells("no finished cell has both a held-out and a training loss for an objective")
    repetitions = sorted({r for gaps in tables.values() for r in gaps.columns})
    alphas = sorted({a for gaps in tables.values() for a in gaps.index})
    every_gap = np.concatenate([gaps.to_numpy().ravel() for gaps in tables.values()])
    top = max(float(np.nanquantile(every_gap, 0.85)), 0.1)
    size = (1.2 + (0.75 * len(repetitions) + 1.9) * len(tables), 1.6 + 0.38 * len(alphas))
    figure = plots.new_figure(*size)
    for axes, (objective, gaps) in zip(
        figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True
    ):
        gap_AxG = gaps.reindex(index=alphas, columns=repetitions).to_numpy()
        plots.plot_gap(axes, repetitions, alphas, gap_AxG, top=top, label="nats per token")
        axes.set_title(objective)
    figure.suptitle("overfitting: final held-out minus training loss (\N{EN DASH}: objective not trained)")
    return figure


def _held_out_metric(table: DataFrame, objective: str) -> str:
    """Returns the column of a held-out loss; that of the averaged weights if no cell has the other one."""
    metric, averaged = f"valid/{objective}/loss", f"valid/ema/{objective}/loss"
    found = measures(table)
    return averaged if averaged in found and metric not in found else metric


def _gaps(table: DataFrame, objective: str) -> DataFrame:
    """Returns the mean gap over seeds, with one row per alpha and one column per R."""
    held_out, training = _held_out_metric(table, objective), f"train/{objective}/loss"
    try:
        cells = comparable(table, held_out)
    except TooFewCells:
        cells = table[:0]
    columns = cells.reindex(columns=["repetitions", "alpha", held_out, training])
    columns["gap"] = (columns[held_out] - columns[training]).astype(float)
    return columns.dropna(subset="gap").pivot_table("gap", "alpha", "repetitions")


def _repetition_grid(surface: Surface) -> np.ndarray:
    low, high = repetition_scale([surface.repetitions_C.min(), surface.repetitions_C.max()])
    return 2 ** np.linspace(low, high, GRID_REPETITIONS)


def _even_alphas(surface: Surface, count: int) -> np.ndarray:
    """Returns `count` alphas over the tried range, evenly spaced on the alpha scale."""
    low, high = alpha_scale([surface.alpha_C.min(), surface.alpha_C.max()])
    return alpha_from_scale(np.linspace(low, high, count)).clip(0, 1)


def _cells_text(cells: DataFrame) -> str:
    """Describes the cells in the title of a plot."""
    parameters = cells["parameters"].dropna()
    sizes = dict.fromkeys(map(_short, (parameters.min(), parameters.max()))) if len(parameters) else ()
    size = f" of {' to '.join(sizes)} parameters" if sizes else ""
    return f"{len(cells)} runs{size}, {_short(cells['budget_tokens'].iloc[0])} tokens each"


def _short(number: float) -> str:
    """Formats a number with 3 digits and a unit, such as "1.64M"."""
    number = float(f"{number:.3g}")  # rounding may lead to the next unit
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
