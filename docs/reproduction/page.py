"""Makes docs/reproduction.md, its plots, two appendices and the tables of `dualsm recommend`.

The sources are runs.csv, repeated.csv, curves.csv, table.csv, baselines.csv, unigram.csv, tasks.csv,
paradigms.csv, documents.csv, infilling.csv, averaged_checkpoints.csv, page.template.md and
methods.template.md:

python docs/reproduction/page.py

The template has `{name}` where a number or table goes; every result is computed from the tables
(page_numbers.py). Numbers in the template are settings and the expectations of protocol.md.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pandas as pd
from page_numbers import Tables, method_values, page_values, read_tables
from page_plots import plot_curves, plot_lengths
from page_tables import checkpoints_table, confirm_table, confirmed_csv, methods_csv, sizes_csv
from selection import LOSS, MASKED, Chosen, Replicates

FOLDER = Path(__file__).parent
PAGE, AVERAGED = FOLDER.parent / "reproduction.md", FOLDER / "averaged_weights.md"
EVERY_METHOD = FOLDER / "methods.md"
TEMPLATE, METHODS_TEMPLATE = FOLDER / "page.template.md", FOLDER / "methods.template.md"
ANALYSIS = FOLDER.parents[1] / "dualsm" / "analysis"
CONFIRMED, METHODS, SIZES = (ANALYSIS / f"{name}.csv" for name in ("confirmed", "methods", "sizes"))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    tables = read_tables()
    runs = tables.runs
    PAGE.write_text(render(tables))
    AVERAGED.write_text(averaged_page(runs, tables.checkpoints))
    EVERY_METHOD.write_text(methods_page(tables))
    CONFIRMED.write_text(confirmed_csv(runs))
    METHODS.write_text(methods_csv(runs, tables.repeated))
    SIZES.write_text(sizes_csv(runs, tables.repeated))
    plot_curves(tables.curves, runs, FOLDER / "curves.png")
    plot_lengths(runs, FOLDER / "lengths.png")


def render(tables: Tables) -> str:
    """Returns the page."""
    values = page_values(tables)

    def value(match: re.Match) -> str:
        return values[match[1]]

    return re.sub(r"\{(\w+)\}", value, TEMPLATE.read_text())


def averaged_page(runs: pd.DataFrame, checkpoints: pd.DataFrame) -> str:
    """Returns the page with the losses of averaged weights."""
    columns = [(f"{name} loss", f"ema_{column}") for name, column in (("causal", LOSS), ("masked", MASKED))]
    parts = [
        "# Losses of averaged weights",
        "Confirmed runs of the [reproduction](../reproduction.md), with a moving average of the weights\n"
        "(EMA, decay 0.995). The settings were chosen for the last weights. Made by `page.py`.",
    ]
    for R in (128, 32):
        parts += [f"R = {R}:", confirm_table(Chosen(runs), Replicates(runs), R, *columns)]
    parts += [
        "## The mean of checkpoints",
        "Full causal runs with weight decay 1.4 on two corpora (seed 2, on CPUs): the last weights, their\n"
        "moving average, and the mean of the last five checkpoints, 115 steps apart\n"
        "(`dualsm convert average --last=5`).",
        checkpoints_table(checkpoints),
        "The moving average has the lowest causal loss on both corpora.",
    ]
    return "\n\n".join(parts) + "\n"


def methods_page(tables: Tables) -> str:
    """Returns the page with every confirmed method."""
    return METHODS_TEMPLATE.read_text().format(**method_values(tables))


if __name__ == "__main__":
    main()
