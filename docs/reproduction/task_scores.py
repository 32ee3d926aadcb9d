"""Collects the task scores of the models on the three corpora in tasks.csv and paradigms.csv (of BLiMP).

    python docs/reproduction/task_scores.py runs/task_scores

The folder has the results of `dualsm evaluate` in files METHOD-CORPUS.json (METHOD: a key of
page_tables.METHODS, with `_` for a space), or in several files METHOD-CORPUS-*.json with different tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from page_tables import METHODS, markdown, pm, signed
from results_folder import collect
from selection import over_corpora

TABLE = Path(__file__).with_name("tasks.csv")
PARADIGMS = Path(__file__).with_name("paradigms.csv")
EQUAL_LENGTH = "(pairs of equal length)"  # a group in the results of BLiMP
SEED = 1


def read_scores(paths: Iterable[Path]) -> pd.DataFrame:
    """Returns a line per model and task.

    `bits_per_byte` and `margin` are those of the right answer, `unigram_bits_per_byte` that of a unigram
    model of the corpus; `score`, and for BLiMP `slor` and `equal_length`, that of the pairs whose sentences
    have equal numbers of tokens, are accuracies.
    """
    lines = []
    for path in paths:
        method, corpus = path.stem.split("-")[:2]
        for task, modes in json.loads(path.read_text())["tasks"].items():
            found = modes["causal"]
            unigram, slor = found["baselines"]["unigram"], found["metrics"].get("slor", {})
            lines.append(
                {
                    "method": method.replace("_", " "),
                    "corpus": corpus,
                    "task": task,
                    "n": found["n"],
                    **{key: found["answer"][key] for key in ("bits_per_byte", "margin")},
                    "unigram_bits_per_byte": unigram["bits_per_byte"],
                    "score": found["score"],
                    "unigram_score": unigram["score"],
                    "slor": slor.get("accuracy"),
                    "equal_length": found["groups"].get(EQUAL_LENGTH, {}).get("score"),
                }
            )
    return pd.DataFrame(lines)


def read_paradigms(paths: Iterable[Path]) -> pd.DataFrame:
    """Returns a line per model and paradigm of BLiMP."""
    lines = []
    for path in paths:
        method, corpus = path.stem.split("-")[:2]
        groups = json.loads(path.read_text())["tasks"].get("blimp", {"causal": {"groups": {}}})["causal"][
            "groups"
        ]
        for name in sorted(groups.keys() - {EQUAL_LENGTH}):
            found = groups[name]
            lines.append((method.replace("_", " "), corpus, name, found["n"], found["score"]))
    return pd.DataFrame(lines, columns=["method", "corpus", "paradigm", "n", "score"])


def by_replicate(scores: pd.DataFrame, method: str, column: str) -> dict[tuple, float]:
    """Returns the mean of a column over the tasks, which count equally, by corpus and seed."""
    means = scores[scores.method == method].groupby("corpus")[column].mean()
    return {(corpus, SEED): float(value) for corpus, value in means.items()}


def scores_table(scores: pd.DataFrame, names: dict[str, str]) -> str:
    """Returns the mean scores of each method over corpora; `names` has the names of the methods."""
    questions, blimp = scores[scores.task != "blimp"], scores[scores.task == "blimp"]
    rows = [
        ["recipe", "bits per byte", "minus the mixture's", "HellaSwag's minus the mixture's",
         "BLiMP, %", "equal length, %", "SLOR, %"]
    ]  # fmt: skip
    for method in METHODS:
        changes = [answer_change(table, method) for table in (questions, scores[scores.task == "hellaswag"])]
        blimp_scores = [
            percent(by_replicate(blimp, method, column)) for column in ("score", "equal_length", "slor")
        ]
        rows.append(
            [
                names[method],
                pm(over_corpora(by_replicate(questions, method, "bits_per_byte"))),
                *("" if method == "mixture" else signed(change) for change in changes),
                *(pm(over_corpora(found), 1) for found in blimp_scores),
            ]
        )
    answer = over_corpora(by_replicate(questions, "mixture", "unigram_bits_per_byte"))
    blimp_score = over_corpora(percent(by_replicate(blimp, "mixture", "unigram_score")))
    rows.append(["unigram model", pm(answer), "", "", pm(blimp_score, 1), "", ""])
    return markdown(rows)


def answer_change(scores: pd.DataFrame, method: str) -> tuple[float, float]:
    """Returns the change in bits per byte from the mixture, and its standard error."""
    mixture, found = (by_replicate(scores, name, "bits_per_byte") for name in ("mixture", method))
    return over_corpora({key: value - mixture[key] for key, value in found.items()})


def percent(values: dict[tuple, float]) -> dict[tuple, float]:
    return {key: 100 * value for key, value in values.items()}


if __name__ == "__main__":
    collect(__doc__, "*-*.json", {TABLE: read_scores, PARADIGMS: read_paradigms}, "%.4f")
