"""Tables of docs/reproduction.md and of `dualsm recommend`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import pandas as pd
from selection import LOSS, MASKED, Chosen, Replicates, by_corpus, over_corpora

from dualsm.analysis.confirmed import ConfirmedCell
from dualsm.analysis.methods import ConfirmedMethod
from dualsm.analysis.sizes import SizeContrast

BATCH_TOKENS = 64 * 128
BUDGET = 1840 * BATCH_TOKENS  # of a full run with 230k parameters
PARAMETERS = {"61k": 61_088, "230k": 230_336, "1.0M": 1_001_088}  # by size
LARGEST = "1.0M"


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def share(alpha: float) -> str:
    """Formats a share as a fraction."""
    return str(Fraction(float(alpha)))


def pm(estimate: tuple[float, float], digits: int = 3) -> str:
    """Formats a mean and its standard error."""
    return f"{estimate[0]:.{digits}f} ± {estimate[1]:.{digits}f}"


def signed(value: tuple[float, float]) -> str:
    """Formats a difference and its standard error."""
    return f"{value[0]:+.3f} ± {value[1]:.3f}"


def confirm_table(chosen: Chosen, replicates: Replicates, R: int, *columns: tuple[str, str]) -> str:
    """Returns a table of the confirmed cells of one R; `columns` are headings and columns of the runs."""
    rows = [["alpha", "weight decay", "length", *(heading for heading, _ in columns)]]
    for alpha in chosen.alphas(R):
        cells = {str(c): c for c in (chosen.best("plain", R, alpha, kind) for kind in ("full", "stop"))}
        for cell in cells.values():
            rows.append([share(alpha), f"{cell['weight_decay']:g}", share(cell["length"])])
            rows[-1] += [pm(over_corpora(replicates.values(cell, column))) for _, column in columns]
    return markdown(rows)


def contrast_cells(chosen: Chosen, R: int, kind: str) -> tuple[dict, dict]:
    """Returns the best mixture and causal training, which a contrast compares; `kind` "full" or "stop"."""
    return chosen.mixture(R, kind), chosen.best("plain", R, 1.0, kind)


SIZE_CONTRASTS = ("equal compute", "causal weight decay", "best stops")


def size_changes(
    runs: pd.DataFrame, repeated: pd.DataFrame, column: str = LOSS
) -> dict[str, dict[str, list[float]]]:
    """Returns mixture minus causal loss at R = 128 by size and contrast, on the corpora of the other sizes.

    A contrast is empty for a size that was not trained with its settings.
    """
    chosen, plain = Chosen(runs), runs[runs.recipe == "plain"]
    others = plain[plain["size"] != "230k"]
    keys = sorted(set(zip(others.corpus, others.seed, strict=True)))
    replicates, on_cpu = Replicates(plain), Replicates(pd.concat([plain, repeated]))
    mixture, causal = contrast_cells(chosen, 128, "full")
    contrasts = (
        (replicates, mixture, causal),
        (on_cpu, mixture, causal | {"weight_decay": FINER_DECAY}),
        (replicates, *contrast_cells(chosen, 128, "stop")),
    )
    changes = {}
    for size in plain.groupby("size").steps.max().sort_values().index:
        changes[size] = {}
        for name, (found, *cells) in zip(SIZE_CONTRASTS, contrasts, strict=True):
            one, other = (found.values(cell | {"size": size}, column) for cell in cells)
            changes[size][name] = [one[key] - other[key] for key in keys if key in one and key in other]
    return changes


def size_tokens(runs: pd.DataFrame) -> dict[str, int]:
    """Returns the tokens of a full run of each size."""
    return (runs[runs.recipe == "plain"].groupby("size").steps.max() * BATCH_TOKENS).to_dict()


def sizes_table(runs: pd.DataFrame, repeated: pd.DataFrame) -> str:
    """Returns the table of `size_changes`."""
    tokens, compute, finer, stop = size_tokens(runs), *SIZE_CONTRASTS
    rows = [["parameters", "tokens", compute, f"{finer} {FINER_DECAY:g}", stop]]
    for size, contrasts in size_changes(runs, repeated).items():
        cells = [", ".join(f"{x:+.3f}" for x in changes) or "not run" for changes in contrasts.values()]
        rows.append([f"{PARAMETERS[size]:,}", f"{tokens[size] / 1e6:.1f}M", *cells])
    return markdown(rows)


def largest_table(runs: pd.DataFrame) -> str:
    """Returns the losses of the largest models on corpus B with every setting."""
    found = runs[(runs["size"] == LARGEST) & (runs.corpus == "B")]
    rows = [["recipe", "weight decay", "length", "causal loss", "masked loss", "causal, EMA", "causal, dev"]]
    columns = [LOSS, MASKED, f"ema_{LOSS}", "dev_causal"]
    for cell in found.sort_values(["alpha", "length", "weight_decay"]).to_dict("records"):
        setting = (describe_recipe(cell), f"{cell['weight_decay']:g}", share(cell["length"]))
        rows.append([*setting, *(f"{cell[column]:.3f}" for column in columns)])
    return markdown(rows)


def sizes_csv(runs: pd.DataFrame, repeated: pd.DataFrame) -> str:
    """Returns the table of `dualsm.analysis.sizes`, without sizes that lack a run."""
    tokens, rows = size_tokens(runs), []
    for size, contrasts in size_changes(runs, repeated).items():
        compute, _, stop = contrasts.values()
        if not len(compute) == len(stop) > 0:
            continue
        limits = [f"{limit(changes):.3f}" for changes in (compute, stop) for limit in (min, max)]
        rows.append([128, PARAMETERS[size], tokens[size], len(compute), *limits])
    return csv_text(SizeContrast._fields, rows)


def readme_table(runs: pd.DataFrame, repeated: pd.DataFrame) -> str:
    """Returns the table of the README: the contrasts of R = 128, and a finer weight decay."""
    chosen, replicates, on_cpu = Chosen(runs), gpu_replicates(runs), cpu_replicates(runs, repeated)
    finer = method_cells(chosen)["causal finer"]
    mixture = chosen.mixture(128, "full")
    rows = [["recipe, R = 128", "compute", "causal loss", "masked-diffusion loss"]]
    for name, cell, found in (
        ("causal", chosen.best("plain", 128, 1.0, "full"), replicates),
        ("causal, shorter run", chosen.best("plain", 128, 1.0, "stop"), replicates),
        (f"causal, weight decay {finer['weight_decay']:g}", finer, on_cpu),
        (f"mixture (alpha {share(mixture['alpha'])})", mixture, replicates),
    ):
        causal, masked = (over_corpora(found.values(cell, column)) for column in (LOSS, MASKED))
        rows.append([name, share(cell["length"]), pm(causal), pm(masked, 2)])
    return markdown(rows)


DROPOUT = 0.1  # of the runs with dropout
FINER_DECAY = 1.4  # tried after the study
OPTIONS = {
    "linear": "linear weight decay",
    "exempt": "no weight decay of vectors and embeddings",
    "adamw": "AdamW with learning rate 0.003",
    "rate": "learning rate 0.02",
}
METHODS = {
    "causal": "causal",
    "causal finer": "causal, tried afterwards",
    "causal dropout": f"causal, dropout {DROPOUT}",
    "mir": "MIR",
    "mixture": "mixture",
    "mixture dropout": f"mixture, dropout {DROPOUT}",
}


def method_cells(chosen: Chosen) -> dict[str, dict]:
    """Returns the best cell of each method at R = 128, at its best stop."""
    return {
        "causal": chosen.best("plain", 128, 1.0, "stop"),
        "causal finer": chosen.best("plain", 128, 1.0, "full") | {"weight_decay": FINER_DECAY},
        "causal dropout": chosen.best("dropout", 128, 1.0, "stop"),
        "mir": chosen.best("mir", 128, 1.0, "stop"),
        "mixture": chosen.mixture(128, "stop"),
        "mixture dropout": chosen.mixture(128, "stop", "dropout"),
    }


def compute(cell: dict) -> float:
    """Returns the compute of a run relative to a full causal run; MIR trains each sequence twice."""
    return cell["length"] * (2 if "mir" in cell["recipe"].split("+") else 1)


def describe_recipe(cell: dict) -> str:
    """Returns the name of a cell's method, such as `mixture 3/4, linear weight decay`, without dropout."""
    parts = cell["recipe"].split("+")
    base = "causal" if cell["alpha"] == 1 else f"mixture {share(cell['alpha'])}"
    extras = [name for part, name in OPTIONS.items() if part in parts]
    return ", ".join(["MIR" if "mir" in parts else base, *extras])


def every_method_table(runs: pd.DataFrame, repeated: pd.DataFrame) -> str:
    """Returns all confirmed cells at R = 128, and the runs that were repeated on a CPU.

    The last column compares with the mixture without dropout on the same hardware.
    """
    on_gpu, on_cpu = gpu_replicates(runs), cpu_replicates(runs, repeated)
    mixture = Chosen(runs).mixture(128, "full")
    rows = [
        ["recipe", "dropout", "weight decay", "tokens", "compute", "device", "runs", "causal loss",
         "masked loss", "causal, EMA", "masked, EMA", "causal loss minus mixture's"]
    ]  # fmt: skip
    columns = (LOSS, MASKED, f"ema_{LOSS}", f"ema_{MASKED}")

    def order(cell: dict) -> tuple:
        return describe_recipe(cell).lower(), "dropout" in cell["recipe"], compute(cell)

    for hardware, replicates in (("GPU", on_gpu), ("CPU", on_cpu)):
        for cell in sorted(replicates.cells(R=128, size="230k", causal_weight=1), key=order):
            losses = replicates.values(cell, LOSS)
            if len(by_corpus(losses)) < 2:
                continue
            dropout = str(DROPOUT) if "dropout" in cell["recipe"] else "0"
            setting = (dropout, f"{cell['weight_decay']:g}", share(cell["length"]), share(compute(cell)))
            means = [pm(over_corpora(replicates.values(cell, column))) for column in columns]
            change = "" if cell == mixture else signed(replicates.common_difference(cell, mixture, LOSS))
            rows.append([describe_recipe(cell), *setting, hardware, str(len(losses)), *means, change])
    return markdown(rows)


def decay_table(runs: pd.DataFrame) -> str:
    """Returns the causal losses of full runs at R = 128 on corpus A, by alpha and weight decay."""
    tuned = runs[(runs.corpus == "A") & (runs.R == 128) & (runs.length == 1) & (runs.recipe == "plain")]
    losses = tuned.pivot(index="alpha", columns="weight_decay", values="dev_causal")
    rows = [["alpha", *(f"weight decay {decay:g}" for decay in losses)]]
    for alpha, found in losses.iterrows():
        rows.append([share(alpha), *("-" if math.isnan(loss) else f"{loss:.3f}" for loss in found)])
    return markdown(rows)


def added_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs that were chosen after the results of the protocol's runs."""
    more = runs[runs.stage == "tune more"][["recipe", "alpha"]].drop_duplicates()
    others = runs.merge(more)
    return pd.concat([runs[runs.stage == "explore"], others[others.stage != "explore"]])


def added_table(runs: pd.DataFrame) -> str:
    """Returns a table of `added_runs`, for protocol.md."""
    added = added_runs(runs)
    rows = [["recipe", "parameters", "alpha", "weight decay", "length", "corpora"]]
    for cell, found in added.groupby(["recipe", "size", "alpha", "weight_decay", "length"]):
        recipe, size, alpha, decay, length = cell
        by_seed = found.sort_values("corpus").groupby("seed").corpus.agg(", ".join)
        corpora = "; ".join(f"{names} (seed {seed})" for seed, names in by_seed.items())
        alpha = "-" if "mir" in recipe else share(alpha)
        rows.append([recipe, size, alpha, f"{decay:g}", share(length), corpora])
    return markdown(rows)


def checkpoints_table(means: pd.DataFrame) -> str:
    """Returns the losses of runs with three kinds of weights: the last ones, EMA, the mean of checkpoints."""
    rows = [["corpus", "weights", "causal loss", "masked loss"]]
    for line in means.itertuples():
        rows.append(
            [line.corpus, line.weights, f"{line.test_causal:.3f}", f"{line.test_masked_diffusion:.3f}"]
        )
    return markdown(rows)


def on_cpus(runs: pd.DataFrame, repeated: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs on CPUs: the repeated ones, those of other methods, and those added afterwards."""
    return pd.concat([repeated, runs[(runs.recipe != "plain") | (runs.stage == "explore")]])


def gpu_replicates(runs: pd.DataFrame) -> Replicates:
    """Returns the confirmed runs on the GPU."""
    return Replicates(runs[(runs.recipe == "plain") & (runs.stage != "explore")])


def cpu_replicates(runs: pd.DataFrame, repeated: pd.DataFrame) -> Replicates:
    """Returns the confirmed runs on CPUs."""
    return Replicates(on_cpus(runs, repeated))


def method_replicates(runs: pd.DataFrame, repeated: pd.DataFrame) -> Replicates:
    """Returns the confirmed runs on CPUs with the corpora and seeds that all methods have."""
    found = on_cpus(runs, repeated)
    common = Replicates(found).common(method_cells(Chosen(runs)).values())
    return Replicates(found[[key in common for key in zip(found.corpus, found.seed, strict=True)]])


def method_names(cells: dict[str, dict]) -> dict[str, str]:
    """Returns the name of each method, with the share of the mixture."""
    return {
        method: METHODS[method].replace("mixture", f"mixture {share(cell['alpha'])}")
        for method, cell in cells.items()
    }


def methods_table(runs: pd.DataFrame, repeated: pd.DataFrame) -> str:
    """Returns the losses of each method at R = 128."""
    cells, replicates = method_cells(Chosen(runs)), method_replicates(runs, repeated)
    rows = [["recipe", "weight decay", "length", "compute", "causal loss", "masked loss"]]
    names = method_names(cells)
    for method, cell in cells.items():
        losses = [pm(over_corpora(replicates.values(cell, column))) for column in (LOSS, MASKED)]
        setting = (f"{cell['weight_decay']:g}", share(cell["length"]), share(compute(cell)))
        rows.append([names[method], *setting, *losses])
    return markdown(rows)


def methods_csv(runs: pd.DataFrame, repeated: pd.DataFrame) -> str:
    """Returns the table of `dualsm.analysis.methods`."""
    cells, replicates, rows = method_cells(Chosen(runs)), method_replicates(runs, repeated), []
    for method, cell in cells.items():
        losses = replicates.values(cell, LOSS)
        setting = (cell["alpha"], cell["weight_decay"], cell["length"], compute(cell))
        dropout = DROPOUT if cell["recipe"] == "dropout" else 0
        rows.append(
            [
                *(128, method, dropout, *(f"{x:g}" for x in setting), len(losses), len(by_corpus(losses))),
                *four_digits(over_corpora(losses), over_corpora(replicates.values(cell, MASKED))),
                *four_digits(replicates.difference(cell, cells["mixture"], LOSS)),
            ]
        )
    return csv_text(ConfirmedMethod._fields, rows)


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
                    *(
                        R,
                        BUDGET // R,
                        BUDGET,
                        PARAMETERS["230k"],
                        f"{cell['alpha']:g}",
                        f"{cell['weight_decay']:g}",
                    ),
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
