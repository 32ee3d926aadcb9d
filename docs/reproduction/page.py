"""Makes docs/reproduction.md, its plots, averaged_weights.md and the table of `dualsm recommend`.

The sources are runs.csv, curves.csv and page.template.md:

python docs/reproduction/page.py

The template has `{name}` where a number or table goes; every number of the study's own runs is computed here.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import pandas as pd
from page_plots import plot_curves, plot_lengths
from selection import LOSS, MASKED, Chosen, Replicates, by_corpus, over_corpora

from dualsm.analysis.confirmed import ConfirmedCell

FOLDER = Path(__file__).parent
PAGE, AVERAGED = FOLDER.parent / "reproduction.md", FOLDER / "averaged_weights.md"
CONFIRMED = FOLDER.parents[1] / "dualsm" / "analysis" / "confirmed.csv"
BUDGET, PARAMETERS = 1840 * 64 * 128, 230_336


def main() -> None:
    runs, curves = (pd.read_csv(FOLDER / name) for name in ("runs.csv", "curves.csv"))
    PAGE.write_text(render(runs))
    AVERAGED.write_text(averaged_page(runs))
    CONFIRMED.write_text(confirmed_csv(runs))
    plot_curves(curves, runs, FOLDER / "curves.png")
    plot_lengths(runs, FOLDER / "lengths.png")


def render(runs: pd.DataFrame) -> str:
    """Returns the page."""
    values = page_values(runs)

    def value(match: re.Match) -> str:
        return values[match[1]]

    return re.sub(r"\{(\w+)\}", value, (FOLDER / "page.template.md").read_text())


def page_values(runs: pd.DataFrame) -> dict[str, str]:
    """Returns the text of each name in the template."""
    chosen, replicates = Chosen(runs), Replicates(runs)
    values = {"num_runs": str(len(runs)), "num_tune": str((runs.stage == "tune").sum())}
    weighted = (runs.corpus != "A") & (runs.causal_weight == 2)
    values["num_confirm"] = str(((runs.corpus != "A") & ~weighted).sum())
    values["num_weight"] = str(weighted.sum())
    values["num_explore"] = str(((runs.corpus == "A") & (runs.stage != "tune")).sum())
    for R in (128, 32):
        for kind in ("full", "stop"):
            mixture, causal = chosen.mixture(R, kind), chosen.best("plain", R, 1.0, kind)
            for name, column in (("causal", LOSS), ("masked", MASKED)):
                values[f"{kind}_{R}_{name}"] = signed(replicates.difference(mixture, causal, column))
            values[f"{kind}_{R}_interval"] = interval(replicates.difference(mixture, causal, LOSS))
            values[f"{kind}_{R}_each"] = ", ".join(
                f"{x:+.3f}" for x in by_corpus(replicates.paired(mixture, causal, LOSS)).values()
            )
            values[f"{kind}_{R}_mixture"] = describe(mixture)
            values[f"{kind}_{R}_only"] = describe(causal)
        values[f"confirm_{R}"] = confirm_table(
            chosen, replicates, R, ("causal loss", LOSS), ("masked loss", MASKED)
        )
        mixture, causal = chosen.mixture(R, "full"), chosen.best("plain", R, 1.0, "full")
        weighted = mixture | {"causal_weight": 2}
        values[f"weight_{R}"] = signed(replicates.difference(weighted, mixture, LOSS))
        values[f"weight_{R}_masked"] = signed(replicates.difference(weighted, mixture, MASKED))
        values[f"ema_{R}"] = signed(replicates.difference(mixture, causal, f"ema_{LOSS}"))
    values["rivals"] = rivals_table(runs)
    return values


def signed(value: tuple[float, float]) -> str:
    return f"{value[0]:+.3f} ± {value[1]:.3f}"


def interval(value: tuple[float, float]) -> str:
    """Returns the 95% interval of a mean over three corpora."""
    half = 4.303 * value[1]  # Student's t with 2 degrees of freedom
    return f"{value[0] - half:+.3f} to {value[0] + half:+.3f}"


def describe(cell: dict) -> str:
    alpha = "" if cell["alpha"] == 1 else f"alpha {Fraction(cell['alpha'])}, "
    return f"{alpha}weight decay {cell['weight_decay']:g}"


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def averaged_page(runs: pd.DataFrame) -> str:
    """Returns the page with the losses of averaged weights."""
    columns = [(f"{name} loss", f"ema_{column}") for name, column in (("causal", LOSS), ("masked", MASKED))]
    parts = [
        "# Losses of averaged weights",
        "Confirmed runs of the [reproduction](../reproduction.md), with a moving average of the weights\n"
        "(EMA, decay 0.995). The settings were chosen for the last weights. Made by `page.py`.",
    ]
    for R in (128, 32):
        parts += [f"R = {R}:", confirm_table(Chosen(runs), Replicates(runs), R, *columns)]
    return "\n\n".join(parts) + "\n"


def confirm_table(chosen: Chosen, replicates: Replicates, R: int, *columns: tuple[str, str]) -> str:
    """Returns a table of the confirmed cells of one R; `columns` are headings and columns of the runs."""
    rows = [["alpha", "weight decay", "length", *(heading for heading, _ in columns)]]
    for alpha in chosen.alphas(R):
        cells = {str(c): c for c in (chosen.best("plain", R, alpha, kind) for kind in ("full", "stop"))}
        for cell in cells.values():
            rows.append([str(Fraction(alpha)), f"{cell['weight_decay']:g}", str(Fraction(cell["length"]))])
            for _, column in columns:
                mean, error = over_corpora(replicates.values(cell, column))
                rows[-1].append(f"{mean:.3f} ± {error:.3f}")
    return markdown(rows)


def confirmed_csv(runs: pd.DataFrame) -> str:
    """Returns the table of `dualsm.analysis.confirmed`.

    Cells with runs that did not diverge on fewer than two corpora have no error and are left out.
    """
    chosen, replicates, rows = Chosen(runs), Replicates(runs), []
    for R in sorted(runs.R.unique().tolist()):
        cells = [
            chosen.best("plain", R, alpha, kind) for alpha in chosen.alphas(R) for kind in ("full", "stop")
        ]
        cells = list({str(cell): cell for cell in cells}.values())
        cells = [cell for cell in cells if len(by_corpus(replicates.values(cell, LOSS))) > 1]
        mixtures = [cell for cell in cells if cell["alpha"] < 1]
        largest = max(cell["alpha"] for cell in mixtures)
        causal = [cell for cell in cells if cell["alpha"] == 1]
        stop = min(causal, key=chosen.loss)
        roles = {
            "causal": min((cell for cell in causal if cell["length"] == 1), key=chosen.loss),
            "causal_stop": stop,
            "mixture": min(mixtures, key=chosen.loss),
            "second_mode": min((cell for cell in mixtures if cell["alpha"] == largest), key=chosen.loss),
        }
        for cell in cells:
            losses = replicates.values(cell, LOSS)
            changes = [replicates.paired(cell, stop, column) for column in (LOSS, MASKED)]
            rows.append(
                [
                    *(R, BUDGET // R, BUDGET, PARAMETERS, f"{cell['alpha']:g}", f"{cell['weight_decay']:g}"),
                    *(
                        f"{cell['length']:g}",
                        len(losses),
                        sum(map(math.isnan, losses.values())),
                        len(by_corpus(losses)),
                    ),
                    *four_digits(over_corpora(losses), over_corpora(replicates.values(cell, MASKED))),
                    len(by_corpus(changes[0])),
                    *four_digits(*map(over_corpora, changes)),
                    " ".join(name for name, other in roles.items() if other == cell),
                ]
            )
    return "\n".join([",".join(ConfirmedCell._fields), *(",".join(map(str, row)) for row in rows)]) + "\n"


def four_digits(*estimates: tuple[float, float]) -> list[str]:
    """Returns the text of each mean and standard error."""
    return [f"{x:.4f}" for estimate in estimates for x in estimate]


def rivals_table(runs: pd.DataFrame) -> str:
    """Returns the best run of each recipe at R = 128 on corpus A and the dev split."""
    rows = [
        ["recipe", "EMA", "weight decay", "length", "compute", "causal loss", "masked loss", "causal, test"]
    ]
    tuned = runs[runs.stage.str.startswith("tune") & (runs.R == 128)]
    recipes = [
        ("causal", tuned[(tuned.recipe == "plain") & (tuned.alpha == 1)]),
        ("causal, dropout 0.1", tuned[(tuned.recipe == "dropout") & (tuned.alpha == 1)]),
        ("MIR without dropout", tuned[tuned.recipe == "mir"]),
        ("mixture", tuned[(tuned.recipe == "plain") & (tuned.alpha < 1)]),
        ("mixture, dropout 0.1", tuned[(tuned.recipe == "dropout") & (tuned.alpha < 1)]),
    ]
    for name, found in recipes:
        for averaging, prefix in (("no", ""), ("yes", "ema_")):
            best = found.loc[found[f"{prefix}dev_causal"].idxmin()]
            alpha = f" {Fraction(best.alpha)}" if name.startswith("mixture") else ""
            rows.append(
                [
                    name.replace("mixture", f"mixture{alpha}"),
                    averaging,
                    f"{best.weight_decay:g}",
                    str(Fraction(best.length)),
                    f"{best.length * (2 if best.recipe == 'mir' else 1):g}",
                    f"{best[f'{prefix}dev_causal']:.3f}",
                    f"{best[f'{prefix}dev_masked_diffusion']:.3f}",
                    f"{best[f'{prefix}test_causal']:.3f}",
                ]
            )
    return markdown(rows)


if __name__ == "__main__":
    main()
