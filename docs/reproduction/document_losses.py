"""Collects the methods' losses by document in documents.csv, and their infilled words in infilling.csv.

    python docs/reproduction/document_losses.py runs/document_losses

The folder has the results of `dualsm evaluate --by_document --infill_words=1024` in files METHOD-CORPUS.json
(METHOD: a key of page_tables.METHODS, with `_` for a space), on a corpus prepared with `--domain_key=unit`
(cut.py).

The standard error over units is that of the choice of the held-out text: a bootstrap over its chapters,
articles and speeches, with the same resamples for all models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from page_tables import METHODS, markdown, pm, signed
from results_folder import collect
from selection import over_corpora

from dualsm.evaluation.bootstrap import bootstrap_stderr

TABLE, INFILLING = (Path(__file__).with_name(name) for name in ("documents.csv", "infilling.csv"))
OBJECTIVES = ("causal", "masked_diffusion")
SEED = 1


def read_losses(paths: Iterable[Path]) -> pd.DataFrame:
    """Returns a line per model and document, with the sums whose ratio is the loss."""
    parts = []
    for path in paths:
        method, corpus = path.stem.split("-")
        held_out = json.loads(path.read_text())["held_out"]
        columns = {"method": method.replace("_", " "), "corpus": corpus}
        for objective in OBJECTIVES:
            found = held_out[objective]["by_document"]
            columns["unit"] = found["domain"]
            columns |= {f"{objective}_{key}": found[key] for key in ("nats", "weight")}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def read_infilling(paths: Iterable[Path]) -> pd.DataFrame:
    """Returns a line per model: the share of words filled in exactly, and their bits per byte."""
    lines = []
    for path in paths:
        method, corpus = path.stem.split("-")
        found = json.loads(path.read_text())["infilling"]
        keys = ("n", "accuracy", "bits_per_byte")
        lines.append(
            {"method": method.replace("_", " "), "corpus": corpus} | {key: found[key] for key in keys}
        )
    return pd.DataFrame(lines)


def infilling_table(infilling: pd.DataFrame, names: dict[str, str]) -> str:
    """Returns the means over corpora; `names` has the names of the methods."""
    rows = [["recipe", "exact, %", "bits per byte"]]
    for method in METHODS:
        found = infilling[infilling.method == method].set_index("corpus")
        exact, bits = (
            over_corpora({(corpus, SEED): float(value) for corpus, value in column.items()})
            for column in (100 * found.accuracy, found.bits_per_byte)
        )
        rows.append([names[method], pm(exact, 1), pm(bits, 2)])
    return markdown(rows)


def losses(documents: pd.DataFrame, method: str, objective: str = "causal") -> dict[tuple, float]:
    """Returns the loss of a method by corpus and seed."""
    sums = documents[documents.method == method].groupby("corpus")[
        [f"{objective}_nats", f"{objective}_weight"]
    ]
    return {(corpus, SEED): nats / weight for corpus, (nats, weight) in sums.sum().iterrows()}


def change(documents: pd.DataFrame, method: str) -> tuple[float, float]:
    """Returns the change in causal loss from the mixture, and its standard error over corpora."""
    mixture, found = (losses(documents, name) for name in ("mixture", method))
    return over_corpora({key: value - mixture[key] for key, value in found.items()})


def error_over_units(documents: pd.DataFrame, method: str) -> float:
    """Returns the standard error of the same change over the units of the held-out text."""
    columns = ["causal_nats", "causal_weight"]
    sums_UxS = np.concatenate(
        [
            documents[(documents.method == name) & (documents.corpus == corpus)]
            .groupby("unit")[columns]
            .sum()
            .to_numpy()
            for corpus in sorted(documents.corpus.unique())
            for name in ("mixture", method)
        ],
        axis=1,
    )

    def mean_change(sums_RxS: np.ndarray) -> np.ndarray:
        losses_RxS = sums_RxS[:, ::2] / sums_RxS[:, 1::2]  # mixture, method, mixture, ... by corpus
        return (losses_RxS[:, 1::2] - losses_RxS[:, ::2]).mean(1)

    return bootstrap_stderr(sums_UxS, mean_change)[0]


def domain_of(unit: str) -> str:
    """Returns the domain of a unit such as "books 3"."""
    return unit.rpartition(" ")[0]


def domains_table(documents: pd.DataFrame, names: dict[str, str]) -> str:
    """Returns the changes in causal loss from the mixture by domain; `names` has the names of the methods."""
    domain = documents.unit.map(domain_of)
    parts = {"all": documents} | dict(iter(documents.groupby(domain)))
    rows = [["recipe", *(f"{name} text" if name == "all" else name for name in parts), "error over units"]]
    for method in METHODS:
        if method != "mixture":
            changes = [signed(change(part, method)) for part in parts.values()]
            rows.append([names[method], *changes, f"{error_over_units(documents, method):.3f}"])
    return markdown(rows)


if __name__ == "__main__":
    collect(__doc__, "*-*.json", {TABLE: read_losses, INFILLING: read_infilling}, "%.6g")
