"""Tables of docs/reproduction.md and of `dualsm recommend`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import pandas as pd
from selection import LOSS, MASKED, Chosen, Replicates, by_corpus, over_corpora

from dualsm.analysis.confirmed import ConfirmedCell
from dualsm.analysis.unconfirmed import TunedRun

BUDGET, PARAMETERS = 1840 * 64 * 128, 230_336


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def share(alpha: float) -> str:
    """Formats a share as a fraction."""
    return str(Fraction(float(alpha)))


def pm(estimate: tuple[float, float], digits: int = 3) -> str:
    """Formats a mean and its standard error."""
    return f"{estimate[0]:.{digits}f} ± {estimate[1]:.{digits}f}"


def confirm_table(chosen: Chosen, replicates: Replicates, R: int, *columns: tuple[str, str]) -> str:
    """Returns a table of the confirmed cells of one R; `columns` are headings and columns of the runs."""
    rows = [["alpha", "weight decay", "length", *(heading for heading, _ in columns)]]
    for alpha in chosen.alphas(R):
        cells = {str(c): c for c in (chosen.best("plain", R, alpha, kind) for kind in ("full", "stop"))}
        for cell in cells.values():
            rows.append([share(alpha), f"{cell['weight_decay']:g}", share(cell["length"])])
            rows[-1] += [pm(over_corpora(replicates.values(cell, column))) for _, column in columns]
    return markdown(rows)


def readme_table(runs: pd.DataFrame) -> str:
    """Returns the table of the README: the contrasts of R = 128."""
    chosen, replicates = Chosen(runs), Replicates(runs)
    mixture = chosen.mixture(128, "full")
    rows = [["recipe, R = 128", "compute", "causal loss", "masked-diffusion loss"]]
    for name, cell in (
        ("causal", chosen.best("plain", 128, 1.0, "full")),
        ("causal, stopped early", chosen.best("plain", 128, 1.0, "stop")),
        (f"mixture (alpha {share(mixture['alpha'])})", mixture),
    ):
        causal, masked = (over_corpora(replicates.values(cell, column)) for column in (LOSS, MASKED))
        rows.append([name, share(cell["length"]), pm(causal), pm(masked, 2)])
    return markdown(rows)


DROPOUT = 0.1  # of the tuning runs with dropout


class Rival(NamedTuple):
    """The best tuning run of a method at R = 128, on corpus A.

    Attributes:
      method: key of `METHODS`.
      averaged: True for the losses of averaged weights.
      alpha, weight_decay, length: settings of the run.
      compute: relative to a full causal run.
      causal, masked: losses on the dev split.
      test, test_masked: losses on the test split.
    """

    method: str
    averaged: bool
    alpha: float
    weight_decay: float
    length: float
    compute: float
    causal: float
    masked: float
    test: float
    test_masked: float


METHODS = {
    "causal": "causal",
    "causal dropout": f"causal, dropout {DROPOUT}",
    "mir": "MIR without dropout",
    "mixture": "mixture",
    "mixture dropout": f"mixture, dropout {DROPOUT}",
}


def tuned_by_method(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Returns the tuning runs at R = 128 of each method, with the column `compute`."""
    tuned = runs[runs.stage.str.startswith("tune") & (runs.R == 128)]
    # MIR trains each sequence twice.
    tuned = tuned.assign(compute=tuned.length * (1 + (tuned.recipe == "mir")))
    by_recipe = {recipe: tuned[tuned.recipe == recipe] for recipe in ("plain", "dropout", "mir")}
    plain, dropout, mir = by_recipe.values()
    return {
        "causal": plain[plain.alpha == 1],
        "causal dropout": dropout[dropout.alpha == 1],
        "mir": mir,
        "mixture": plain[plain.alpha < 1],
        "mixture dropout": dropout[dropout.alpha < 1],
    }


def rivals(runs: pd.DataFrame) -> list[Rival]:
    """Returns the best run of each method, chosen by causal loss on the dev split."""
    found = []
    for method, tuned in tuned_by_method(runs).items():
        for averaged, prefix in ((False, ""), (True, "ema_")):
            best = tuned.loc[tuned[f"{prefix}dev_causal"].idxmin()]
            losses = [best[prefix + name] for name in ("dev_causal", "dev_masked_diffusion", LOSS, MASKED)]
            setting = (best.alpha, best.weight_decay, best.length, best.compute)
            found.append(Rival(method, averaged, *setting, *losses))
    return found


def rivals_table(runs: pd.DataFrame) -> str:
    """Returns the best run of each recipe at R = 128 on corpus A and the dev split."""
    rows = [
        ["recipe", "EMA", "weight decay", "length", "compute", "causal loss", "masked loss", "causal, test"]
    ]
    for rival in rivals(runs):
        name = METHODS[rival.method].replace("mixture", f"mixture {share(rival.alpha)}")
        rows.append(
            [
                *(name, "yes" if rival.averaged else "no", f"{rival.weight_decay:g}"),
                *(share(rival.length), f"{rival.compute:g}"),
                *(f"{loss:.3f}" for loss in (rival.causal, rival.masked, rival.test)),
            ]
        )
    return markdown(rows)


def tuned_csv(runs: pd.DataFrame) -> str:
    """Returns the table of `dualsm.analysis.unconfirmed`, with the losses on the test split."""
    rows = []
    for rival in rivals(runs):
        if not rival.averaged:
            setting = (rival.alpha, rival.weight_decay, rival.length, rival.compute)
            dropout = DROPOUT if rival.method.endswith("dropout") else 0
            losses = [f"{loss:.4f}" for loss in (rival.test, rival.test_masked)]
            rows.append([128, rival.method, dropout, *(f"{x:g}" for x in setting), *losses])
    return csv_text(TunedRun._fields, rows)


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
    return csv_text(ConfirmedCell._fields, rows)


def csv_text(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Returns a table as comma-separated values."""
    return "".join(",".join(map(str, row)) + "\n" for row in (header, *rows))


def four_digits(*estimates: tuple[float, float]) -> list[str]:
    """Returns the text of each mean and standard error."""
    return [f"{x:.4f}" for estimate in estimates for x in estimate]
