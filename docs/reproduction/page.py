"""Makes docs/reproduction.md, its plots and the table of `dualsm recommend`.

The sources are runs.csv, curves.csv and page.template.md:

python docs/reproduction/page.py

The template has `{name}` where a number or table goes; every number of the study's own runs is computed here.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "reproduction.md"
CONFIRMED = FOLDER.parents[1] / "dualsm" / "analysis" / "confirmed.csv"
BUDGET, PARAMETERS = 1840 * 64 * 128, 230_336
LOSS, MASKED = "test_causal", "test_masked_diffusion"
CELL = ["recipe", "R", "alpha", "weight_decay", "length", "causal_weight", "size"]


def main() -> None:
    runs, curves = (pd.read_csv(FOLDER / name) for name in ("runs.csv", "curves.csv"))
    PAGE.write_text(render(runs))
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
    chosen = Chosen(runs)
    values = {"num_runs": str(len(runs)), "num_tune": str((runs.stage == "tune").sum())}
    weighted = (runs.corpus != "A") & (runs.causal_weight == 2)
    values["num_confirm"] = str(((runs.corpus != "A") & ~weighted).sum())
    values["num_weight"] = str(weighted.sum())
    values["num_explore"] = str(((runs.corpus == "A") & (runs.stage != "tune")).sum())
    for R in (128, 32):
        for kind in ("full", "stop"):
            mixture, causal = chosen.mixture(R, kind), chosen.best("plain", R, 1.0, kind)
            for name, column in (("causal", LOSS), ("masked", MASKED)):
                values[f"{kind}_{R}_{name}"] = signed(difference(runs, mixture, causal, column))
            values[f"{kind}_{R}_interval"] = interval(difference(runs, mixture, causal, LOSS))
            values[f"{kind}_{R}_each"] = ", ".join(
                f"{x:+.3f}" for x in paired(runs, mixture, causal, LOSS).groupby("corpus").mean()
            )
            values[f"{kind}_{R}_mixture"] = describe(mixture)
            values[f"{kind}_{R}_only"] = describe(causal)
        values[f"confirm_{R}"] = confirm_table(runs, chosen, R)
        weighted = chosen.mixture(R, "full") | {"causal_weight": 2}
        values[f"weight_{R}"] = signed(difference(runs, weighted, chosen.mixture(R, "full"), LOSS))
        values[f"weight_{R}_masked"] = signed(difference(runs, weighted, chosen.mixture(R, "full"), MASKED))
        values[f"ema_{R}"] = signed(
            difference(runs, chosen.mixture(R, "full"), chosen.best("plain", R, 1.0, "full"), f"ema_{LOSS}")
        )
    values["rivals"] = rivals_table(runs)
    return values


class Chosen:
    """The choices of the protocol, made on corpus A and the dev split."""

    def __init__(self, runs: pd.DataFrame):
        self._tuned = runs[runs.stage.str.startswith("tune")]

    def best(self, recipe: str, R: int, alpha: float, kind: str) -> dict:
        """Returns the cell with the lowest causal loss; `kind` "full" or "stop"."""
        t = self._tuned
        t = t[(t.recipe == recipe) & (t.R == R) & (t.alpha == alpha)]
        if kind == "full":
            t = t[t.length == 1]
        return t.loc[t.dev_causal.idxmin(), CELL].to_dict()

    def loss(self, cell: dict) -> float:
        """Returns the causal loss of a cell on corpus A and the dev split."""
        return float(select(self._tuned, cell).dev_causal.iloc[0])

    def alphas(self, R: int) -> list[float]:
        t = self._tuned
        return sorted(t[(t.recipe == "plain") & (t.R == R)].alpha.unique())

    def mixture(self, R: int, kind: str) -> dict:
        """Returns the best cell of the best mixture."""
        cells = [self.best("plain", R, alpha, kind) for alpha in self.alphas(R) if alpha < 1]
        return min(cells, key=self.loss)


def select(runs: pd.DataFrame, cell: dict) -> pd.DataFrame:
    """Returns the runs of a cell."""
    for key in CELL:
        runs = runs[runs[key] == cell[key]]
    return runs


def replicates(runs: pd.DataFrame, cell: dict, column: str) -> pd.Series:
    """Returns a column of the confirmed runs of a cell, by corpus and seed."""
    return select(runs[runs.corpus != "A"], cell).set_index(["corpus", "seed"])[column]


def paired(runs: pd.DataFrame, a: dict, b: dict, column: str) -> pd.Series:
    """Returns the difference of two cells by corpus and seed.

    Raises:
      ValueError: if the cells do not have the same replicates.
    """
    first, second = (replicates(runs, cell, column).sort_index() for cell in (a, b))
    if not first.index.equals(second.index):
        raise ValueError(f"{a} and {b} have different replicates")
    return first - second


def over_corpora(values: pd.Series) -> tuple[float, float]:
    """Returns mean and standard error over corpora; seeds of a corpus are averaged first."""
    means = values.groupby("corpus").mean()
    return float(means.mean()), float(means.std() / len(means) ** 0.5)


def difference(runs: pd.DataFrame, a: dict, b: dict, column: str) -> tuple[float, float]:
    return over_corpora(paired(runs, a, b, column))


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


def confirm_table(runs: pd.DataFrame, chosen: Chosen, R: int) -> str:
    """Returns the table of the confirmed cells of one R."""
    rows = [["alpha", "weight decay", "length", "causal loss", "masked loss", "causal loss (EMA)"]]
    for alpha in chosen.alphas(R):
        cells = {str(c): c for c in (chosen.best("plain", R, alpha, kind) for kind in ("full", "stop"))}
        for cell in cells.values():
            rows.append([str(Fraction(alpha)), f"{cell['weight_decay']:g}", str(Fraction(cell["length"]))])
            for column in (LOSS, MASKED, f"ema_{LOSS}"):
                mean, error = over_corpora(replicates(runs, cell, column))
                rows[-1].append(f"{mean:.3f} ± {error:.3f}")
    return markdown(rows)


def confirmed_csv(runs: pd.DataFrame) -> str:
    """Returns the table of `dualsm.analysis.confirmed`."""
    chosen, rows = Chosen(runs), []
    for R in (32, 128):
        largest = max(alpha for alpha in chosen.alphas(R) if alpha < 1)
        roles = {
            "causal": chosen.best("plain", R, 1.0, "full"),
            "causal_stop": chosen.best("plain", R, 1.0, "stop"),
            "mixture": chosen.mixture(R, "stop"),
            "second_mode": chosen.best("plain", R, largest, "stop"),
        }
        for alpha in chosen.alphas(R):
            cells = {str(c): c for c in (chosen.best("plain", R, alpha, kind) for kind in ("full", "stop"))}
            for cell in cells.values():
                losses = [
                    f"{x:.4f}"
                    for column in (LOSS, MASKED)
                    for x in over_corpora(replicates(runs, cell, column))
                ]
                setting = [R, BUDGET // R, BUDGET, PARAMETERS, f"{alpha:g}", f"{cell['weight_decay']:g}"]
                mine = " ".join(name for name, other in roles.items() if other == cell)
                rows.append(
                    [*setting, f"{cell['length']:g}", len(replicates(runs, cell, LOSS)), *losses, mine]
                )
    names = "repetitions,unique_tokens,budget_tokens,parameters,alpha,weight_decay,length,replicates,"
    names += "causal,causal_error,masked,masked_error,roles"
    return "\n".join([names, *(",".join(map(str, row)) for row in rows)]) + "\n"


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


def plot_curves(curves: pd.DataFrame, runs: pd.DataFrame, path: Path) -> None:
    """Plots held-out losses over training at R = 128: causal, causal stopped, mixture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = Chosen(runs)
    cells = [
        ("causal", "#c44e52", chosen.best("plain", 128, 1.0, "full")),
        ("causal, stopped early", "#dd9b5f", chosen.best("plain", 128, 1.0, "stop")),
        ("mixture (alpha 3/4)", "#3b6fb5", chosen.mixture(128, "full")),
    ]
    figure, axes = plt.subplots(2, 1, figsize=(7, 6.4), sharex=True, layout="constrained")
    for label, colour, cell in cells:
        found = curves
        for key in CELL:
            found = found[found[key] == cell[key]]
        for axis, column in zip(axes, ("causal", "masked_diffusion"), strict=True):
            by_step = found.groupby("step")[column].agg(["mean", "min", "max"])
            tokens = by_step.index * 64 * 128 / 1e6
            axis.fill_between(tokens, by_step["min"], by_step["max"], color=colour, alpha=0.25, linewidth=0)
            axis.plot(tokens, by_step["mean"], color=colour, label=label, linewidth=2)
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
        label = f"alpha {Fraction(alpha)}"
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


if __name__ == "__main__":
    main()
