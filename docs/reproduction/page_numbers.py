"""The numbers in the text of docs/reproduction.md, each computed from the tables.

`page_values` returns the text of each `{name}` in page.template.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from document_losses import domains_table, error_over_units, infilling_table
from page_tables import (
    BUDGET,
    LARGEST,
    OPTIONS,
    PARAMETERS,
    added_runs,
    confirm_table,
    contrast_cells,
    cpu_replicates,
    decay_table,
    every_method_table,
    gpu_replicates,
    largest_table,
    method_cells,
    method_names,
    method_replicates,
    methods_table,
    pm,
    share,
    signed,
    size_changes,
    sizes_table,
)
from selection import CELL, DIVERGED, LOSS, MASKED, Chosen, Replicates, by_corpus, over_corpora
from task_scores import answer_change, scores_table

from dualsm.analysis.paper_rules import causal_share_of_loss, rule_alpha
from dualsm.analysis.small_share import small_share, span

FOLDER = Path(__file__).parent
T_95 = 4.303  # 97.5% quantile of Student's t distribution with 2 degrees of freedom: three corpora
EARLIER_LOSS = "valid/causal/loss"
EARLIER_DECAY, EARLIER_RATE = "optimizer.weight_decay", "optimizer.learning_rate"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Tables(NamedTuple):
    """The committed tables that the page is made from.

    Attributes:
      runs, curves: runs of the study, and their learning curves.
      earlier: runs of the first study (table.csv).
      baselines: its runs with other settings and methods.
      unigram: held-out losses of unigram models of the corpora.
      repeated: confirmed runs without dropout and MIR, repeated on a CPU.
      tasks: task scores of the methods (task_scores.py).
      paradigms: scores of the methods by paradigm of BLiMP.
      documents: held-out losses of the methods by document (document_losses.py).
      infilling: words that the methods fill in.
      checkpoints: losses of full causal runs with last, moving-average and averaged-checkpoint weights.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    earlier: pd.DataFrame
    baselines: pd.DataFrame
    unigram: pd.DataFrame
    repeated: pd.DataFrame
    tasks: pd.DataFrame
    paradigms: pd.DataFrame
    documents: pd.DataFrame
    infilling: pd.DataFrame
    checkpoints: pd.DataFrame


def read_tables() -> Tables:
    """Reads the committed tables."""
    names = ("runs", "curves", "table", "baselines", "unigram", "repeated", "tasks")
    names += ("paradigms", "documents", "infilling", "averaged_checkpoints")
    return Tables(*(pd.read_csv(FOLDER / f"{name}.csv") for name in names))


def page_values(tables: Tables) -> dict[str, str]:
    """Returns the text of each name in the template."""
    runs, earlier = tables.runs, _Earlier(tables)
    chosen, replicates = Chosen(runs), Replicates(runs)
    values = (
        count_runs(runs, tables.repeated)
        | _tuning(runs, chosen)
        | _methods(tables, chosen)
        | _finer_decay(tables, chosen)
        | _learning_rate(tables, chosen)
        | earlier.values()
    )
    values |= _sizes(tables)
    for R in (128, 32):
        values |= _contrasts(R, chosen, replicates)
        values[f"unique_{R}"] = f"{BUDGET // R:,}"
        rule = rule_alpha(R)
        values[f"rule_{R}"], values[f"rule_{R}_weighted"] = share(rule), f"{causal_share_of_loss(rule):.2f}"
    lower = [-replicates.difference(*contrast_cells(chosen, R, kind), MASKED)[0] for R, kind in CONTRASTS]
    values["masked_lower"] = span(lower, ".0f")
    values["full_128_effect"] = f"{-replicates.difference(*contrast_cells(chosen, 128, 'full'), LOSS)[0]:.1f}"
    changes = repeated_changes(runs, tables.repeated)
    values["num_repeated"] = str(len(tables.repeated))
    values["num_runs"] = str(len(runs) + len(tables.repeated))
    values["cpu_change"], values["cpu_mean"] = span(changes, "+.3f"), f"{changes.mean():+.3f}"
    errors = [error_over_units(tables.documents, m) for m in method_cells(chosen) if m != "mixture"]
    values["units_error"] = span(errors, ".3f")
    values["num_documents"] = str(tables.documents.groupby(["method", "corpus"]).size().max())
    values["unigram"] = span(tables.unigram.query("corpus != 'A'").test, ".2f")
    return values


CONTRASTS = ((128, "full"), (128, "stop"), (32, "full"))


def count_runs(runs: pd.DataFrame, repeated: pd.DataFrame) -> dict[str, str]:
    """Returns the numbers of runs."""
    every = pd.concat([runs, repeated])
    diverged = ~(every[["dev_causal", LOSS]] < DIVERGED).all(axis=1)  # NaN is a divergence
    is_other = runs["size"] != "230k"
    num_runs, num_added, runs = len(runs), len(added_runs(runs)), runs[~is_other]
    explore = runs.stage == "explore"
    confirm = (runs.corpus != "A") & ~explore
    weighted = confirm & (runs.causal_weight == 2)
    plain, other = runs.recipe == "plain", confirm & (runs.recipe != "plain")
    by_cell = runs[confirm & plain & (runs.R == 128)].groupby(CELL)
    return {
        "parameters": f"{PARAMETERS['230k']:,}",
        "budget": f"{BUDGET / 1e6:.2f}M",
        "num_runs": str(num_runs),
        "num_size": str(is_other.sum()),
        "num_gpu": str((~other & ~explore & (runs.stage != "tune more")).sum()),
        "num_tune": str((runs.stage == "tune").sum()),
        "num_confirm": str((confirm & plain & ~weighted).sum()),
        "num_methods": str(other.sum()),
        "num_weight": str(weighted.sum()),
        "num_tune_methods": str(runs.stage.str.startswith("tune ").sum()),
        "num_explore": str(explore.sum()),
        "num_added": str(num_added),
        "num_diverged": str(diverged.sum()),
        "num_skipped": str((every.skipped > 0).sum()),
        "replicates_128": word(by_cell.size().min()),
    }


def _contrasts(R: int, chosen: Chosen, replicates: Replicates) -> dict[str, str]:
    """Returns the values of one R that come from the confirmed runs."""
    values = {}
    for kind in ("full", "stop"):
        mixture, causal = contrast_cells(chosen, R, kind)
        for name, column in (("causal", LOSS), ("masked", MASKED)):
            values[f"{kind}_{R}_{name}"] = signed(replicates.difference(mixture, causal, column))
        values[f"{kind}_{R}_interval"] = interval(replicates.difference(mixture, causal, LOSS))
        each = by_corpus(replicates.paired(mixture, causal, LOSS)).values()
        values[f"{kind}_{R}_each"] = ", ".join(f"{x:+.3f}" for x in each)
        values[f"{kind}_{R}_mixture"], values[f"{kind}_{R}_only"] = describe(mixture), describe(causal)
        values[f"{kind}_{R}_repetitions"] = f"{R * mixture['length']:g}"
        values[f"{kind}_{R}_only_repetitions"] = f"{R * causal['length']:g}"
        values[f"{kind}_{R}_compute"] = word(mixture["length"] / causal["length"])
    mixture, causal = contrast_cells(chosen, R, "full")
    weighted = mixture | {"causal_weight": 2}
    values[f"weight_{R}"] = signed(replicates.difference(weighted, mixture, LOSS))
    values[f"weight_{R}_masked"] = signed(replicates.difference(weighted, mixture, MASKED))
    values[f"ema_{R}"] = signed(replicates.difference(mixture, causal, f"ema_{LOSS}"))
    values[f"confirm_{R}"] = confirm_table(
        chosen, replicates, R, ("causal loss", LOSS), ("masked loss", MASKED)
    )
    cells = [chosen.best("plain", R, alpha, "full") for alpha in chosen.alphas(R)]
    best = min(cells, key=lambda cell: over_corpora(replicates.values(cell, LOSS))[0])
    alike = [cell for cell in cells if cell == best or _alike(replicates.difference(cell, best, LOSS))]
    values[f"best_{R}"] = " or ".join(share(cell["alpha"]) for cell in alike)
    highest = max(cell["alpha"] for cell in cells if cell["alpha"] < 1)
    values[f"highest_{R}_masked_share"] = f"{1 - highest:.0%}"
    return values


def _alike(difference: tuple[float, float]) -> bool:
    """Returns True if the 95% interval of a difference contains 0."""
    return abs(difference[0]) <= T_95 * difference[1]


def _tuning(runs: pd.DataFrame, chosen: Chosen) -> dict[str, str]:
    """Returns the values about the weight decays, lengths and losses of the tuning runs."""
    tuned = runs[runs.stage == "tune"]
    decays = sorted(tuned[tuned.R == 128].weight_decay.unique())
    steps = [
        np.abs(np.diff(tuned[(tuned.R == R) & (tuned.alpha == alpha)].pivot(
            index="weight_decay", columns="length", values="dev_causal"), axis=axis)).max(initial=0)
        for R in (128, 32) for alpha in chosen.alphas(R) for axis in (0, 1)
    ]  # fmt: skip
    grids = [
        sorted(tuned[tuned.R == R][key].unique()) for R in (128, 32) for key in ("weight_decay", "length")
    ]
    ratios = np.concatenate([np.divide(grid[1:], grid[:-1]) for grid in grids])
    return {
        "num_decays": word(len(decays)),
        "highest_decay": f"{decays[-1]:g}",
        "causal_decay": f"{chosen.best('plain', 128, 1.0, 'full')['weight_decay']:g}",
        "step_factors": span(ratios, ".2g"),
        "largest_step": f"{np.nanmax(steps):.0f}",
        "num_cells": span(tuned.groupby(["R", "alpha"]).size(), "d"),
    }


def repeated_changes(runs: pd.DataFrame, repeated: pd.DataFrame) -> pd.Series:
    """Returns the changes in causal loss of the runs that were repeated on a CPU."""
    both = runs.astype(repeated.dtypes).merge(repeated, on=[*CELL, "corpus", "seed"], suffixes=("", "_again"))
    return both[f"{LOSS}_again"] - both[LOSS]


def _finer_decay(tables: Tables, chosen: Chosen) -> dict[str, str]:
    """Returns the causal losses with a weight decay between those of the protocol, tried afterwards."""
    mixture, causal = contrast_cells(chosen, 128, "full")
    finer, replicates = method_cells(chosen)["causal finer"], cpu_replicates(tables.runs, tables.repeated)
    explored = tables.runs.query("stage == 'explore' and corpus == 'A' and recipe == 'plain'")
    near = max(alpha for alpha in chosen.alphas(128) if alpha < 1)
    losses = replicates.values(finer, LOSS)
    values = {
        "finer_decay": f"{finer['weight_decay']:g}",
        "finer_runs": word(len(losses)),
        "finer_causal": pm(over_corpora(losses)),
        "finer_pairs": word(len(replicates.common([mixture, finer]))),
        "near_causal": share(near),
    }
    for prefix in ("", "ema_"):
        difference = replicates.common_difference(mixture, finer, f"{prefix}{LOSS}")
        values[f"finer_{prefix}change"] = signed(difference)
    values["finer_effect"] = f"{-replicates.common_difference(mixture, finer, LOSS)[0]:.2f}"
    for name, cell in (
        ("causal", causal),
        ("near", chosen.best("plain", 128, near, "full")),
        ("mixture", mixture),
    ):
        values[f"tuned_{name}"] = f"{chosen.loss(cell):.3f}"
        values[f"explored_{name}"] = f"{explored[explored.alpha == cell['alpha']].dev_causal.min():.3f}"
    return values


def _learning_rate(tables: Tables, chosen: Chosen) -> dict[str, str]:
    """Returns the losses of causal training at its best stop with a higher learning rate."""
    mixture, causal = contrast_cells(chosen, 128, "stop")
    replicates, faster = cpu_replicates(tables.runs, tables.repeated), causal | {"recipe": "rate"}
    tuned = tables.runs.query("corpus == 'A' and recipe == 'rate' and alpha < 1")
    best = tuned.loc[tuned.dev_causal.idxmin()]
    base = {key: best[key] for key in CELL} | {"recipe": "plain"}
    contrast = replicates.common_difference(mixture, faster, LOSS)
    return {
        "rate_change": signed(replicates.common_difference(faster, causal, LOSS)),
        "rate_contrast": signed(contrast),
        "rate_stop": f"{over_corpora(replicates.values(faster, LOSS))[0]:.3f}",
        "rate_interval": interval(contrast),
        "rate_base": f"{chosen.loss(base):.3f}",
        "rate_mixture": f"{best.dev_causal:.3f}",
    }


def _sizes(tables: Tables) -> dict[str, str]:
    """Returns the table of sizes, and the contrasts of the largest."""
    contrasts = size_changes(tables.runs, tables.repeated)[LARGEST]
    return {
        "sizes": sizes_table(tables.runs, tables.repeated),
        "largest": f"{PARAMETERS[LARGEST]:,}",
        "largest_compute": span(contrasts["equal compute"], "+.3f"),
        "largest_stop": span(contrasts["best stops"], "+.3f"),
    }


def _largest_ema(tables: Tables) -> str:
    """Returns the contrast of the largest size at equal compute with averaged weights, over corpora."""
    contrasts = size_changes(tables.runs, tables.repeated, f"ema_{LOSS}")[LARGEST]
    return span(contrasts["equal compute"], "+.3f")


def _methods(tables: Tables, chosen: Chosen) -> dict[str, str]:
    """Returns the losses of other methods in the text below their table."""
    cells, replicates = method_cells(chosen), method_replicates(tables.runs, tables.repeated)
    replicate_keys = replicates.common(cells.values())
    values = {
        "methods": methods_table(tables.runs, tables.repeated),
        "methods_corpora": word(len({corpus for corpus, _ in replicate_keys})),
        "methods_runs": word(len(replicate_keys)),
    }
    for method, cell in cells.items():
        name, masked = method.replace(" ", "_"), over_corpora(replicates.values(cell, MASKED))
        values[f"masked_{name}"] = f"{masked[0]:.1f}"
        difference = replicates.difference(cell, cells["mixture"], LOSS)
        values[f"method_{name}"], values[f"method_{name}_interval"] = signed(difference), interval(difference)
        answers = answer_change(tables.tasks[tables.tasks.task != "blimp"], method)
        hellaswag = answer_change(tables.tasks[tables.tasks.task == "hellaswag"], method)
        values[f"answers_{name}"], values[f"hellaswag_{name}"] = signed(answers), signed(hellaswag)
    return values


def method_values(tables: Tables) -> dict[str, str]:
    """Returns the values in methods.template.md."""
    runs = tables.runs
    chosen, on_cpu = Chosen(runs), cpu_replicates(runs, tables.repeated)
    mir = [chosen.best("mir", 128, 1.0, kind) for kind in ("full", "stop")]
    cells: dict[str, list] = {}
    for replicates in (gpu_replicates(runs), on_cpu):
        for cell in replicates.cells(R=128, size="230k", causal_weight=1):
            parts = set(cell["recipe"].split("+"))
            if parts & set(OPTIONS):
                continue
            name = "MIR" if "mir" in parts else "causal" if cell["alpha"] == 1 else "mixture"
            name += " with dropout" * ("dropout" in parts)
            columns = ("ema_dev_causal", f"ema_{LOSS}")
            cells.setdefault(name, []).append(
                [over_corpora(replicates.values(cell, column))[0] for column in columns]
            )
    averaged = {name: min(found)[1] for name, found in cells.items()}  # chosen on the dev split
    best = sorted(averaged, key=averaged.get)
    methods = method_cells(chosen)
    finer = methods["causal finer"]["weight_decay"]
    stop = share(methods["causal"]["length"])
    names = method_names(methods) | {
        "causal": f"causal, {stop} of the tokens",
        "causal finer": f"causal, weight decay {finer:g}",
    }
    ellipsis = tables.paradigms[tables.paradigms.paradigm == "ellipsis_n_bar_1"]
    by_task = tables.tasks.groupby("task").n.max()
    return {
        "table": every_method_table(runs, tables.repeated),
        "decays": decay_table(runs),
        "largest": f"{PARAMETERS[LARGEST]:,}",
        "largest_table": largest_table(runs),
        "largest_ema": _largest_ema(tables),
        "tasks": scores_table(tables.tasks, names),
        "domains": domains_table(tables.documents, names),
        **{
            f"ellipsis_{method.replace(' ', '_')}": f"{100 * score:.0f}"
            for method, score in ellipsis.groupby("method").score.mean().items()
        },
        "infilling": infilling_table(tables.infilling, names),
        "num_words": f"{tables.infilling.n.max():,}",
        "num_units": str(tables.documents.unit.nunique()),
        "num_questions": f"{by_task.drop('blimp').sum():,}",
        "num_pairs": f"{by_task['blimp']:,}",
        "mir_full_change": signed(on_cpu.common_difference(*mir, LOSS)),
        "mir_full_ema_change": signed(on_cpu.common_difference(*mir, f"ema_{LOSS}")),
        "averaged": ", ".join(f"{name} {averaged[name]:.3f}" for name in best),
    }


class _Earlier:
    """The runs of the first study."""

    def __init__(self, tables: Tables):
        both = pd.concat([tables.baselines, tables.earlier])
        done = both[both.status == "done"].drop_duplicates("name")
        self._runs, self._earlier = done, tables.earlier

    def values(self) -> dict[str, str]:
        often = self._runs[(self._runs.repetitions == 128) & (self._runs.steps == self._runs.steps.max())]
        often = often[(often[EARLIER_DECAY] == 0.1) & (often[EARLIER_RATE] == 0.01)]
        by_alpha = often.groupby("alpha")[EARLIER_LOSS].mean()
        price = small_share(self._earlier.to_dict("records"))
        return {
            "earlier_best": share(by_alpha.idxmin()),
            "earlier_effect": f"{by_alpha[1.0] - by_alpha.min():.0f}",
            "price_share": f"{price.masked_share:.1%}",
            "price_causal": span(price.causal_changes, ".3f"),
            "price_gain": span([-change for change in price.masked_changes], ".1f"),
            "price_repetitions": span(price.repetitions, ""),
            "price_seeds": " or ".join(word(n) for n in sorted(set(price.seeds))),
        }


def interval(value: tuple[float, float]) -> str:
    """Returns the 95% interval of a mean over three corpora."""
    half = T_95 * value[1]
    return f"{value[0] - half:+.3f} to {value[0] + half:+.3f}"


def word(number: float) -> str:
    """Returns a number as a word if it is a small integer."""
    return WORDS[int(number)] if number in range(len(WORDS)) else f"{number:g}"


def describe(cell: dict) -> str:
    alpha = "" if cell["alpha"] == 1 else f"alpha {share(cell['alpha'])}, "
    return f"{alpha}weight decay {cell['weight_decay']:g}"
