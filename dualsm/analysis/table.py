"""The table of a sweep's cells, and the selection of rows that can be compared with each other.

A table is a pandas DataFrame with one row per cell; `sweeps.cells.collect` describes its columns.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from dualsm.analysis.analysis_errors import TooFewCells, analysis_extra
from dualsm.process.errors import UserError
from dualsm.process.output import write_atomically
from dualsm.process.paths import user_path
from dualsm.sweeps.cells import collect

if TYPE_CHECKING:
    from pandas import DataFrame

TABLE = "table.csv"
# Columns that are neither swept keys nor measurements. The names of measurements contain a "/".
_FIXED = (
    "name", "status", "reason", "repetitions", "alpha", "seed",
    "budget_tokens", "unique_tokens", "parameters", "seconds", "step", "flops",
)  # fmt: skip
_NUMERIC = _FIXED[3:]
_RANGES = {"repetitions": (1, math.inf), "alpha": (0, 1), "budget_tokens": (1, math.inf)}
_PLACE = ["repetitions", "alpha", "budget_tokens"]
# Relative difference of unique tokens that count as equal: runs round them to whole batches.
_TOLERANCE = 0.02


def load(source: epath.PathLike) -> DataFrame:
    """Returns the table of a sweep's folder, or of a CSV file that `write_table` wrote.

    Raises:
      UserError: if `source` is neither, or pandas is not installed.
    """
    return make_table(collect(source)) if user_path(source).is_dir() else read_table(source)


def make_table(records: Sequence[Mapping] | DataFrame) -> DataFrame:
    """Returns a table of records, one per cell. Values that are missing or not finite become NaN.

    Raises:
      UserError: if pandas is not installed.
    """
    with analysis_extra():
        import pandas as pd

    table = pd.DataFrame(records).reset_index(drop=True)
    table = table.reindex(columns=sorted(dict.fromkeys([*_FIXED, *table.columns]), key=_position))
    for column in table:
        if column in _NUMERIC or "/" in column:
            numbers = pd.to_numeric(table[column], errors="coerce").astype(float)
            table[column] = numbers.where(np.isfinite(numbers))
        elif table[column].dtype == object:  # a damaged config may contain values that cannot be grouped by
            table[column] = table[column].map(lambda v: str(v) if isinstance(v, (list, dict)) else v)
    return table


def write_table(path: epath.PathLike, table: DataFrame) -> None:
    """Writes a table as CSV; missing values are empty fields."""
    write_atomically(path, table.convert_dtypes().to_csv(index=False))


def read_table(path: epath.PathLike) -> DataFrame:
    """Reads a CSV file that `write_table` wrote.

    Raises:
      UserError: if the file cannot be read or is not a table of cells, or pandas is not installed.
    """
    with analysis_extra():
        import pandas as pd

    try:
        text = user_path(path).read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header, *lines = [line for line in reader if line] or [[]]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; pass a sweep's folder or its {TABLE}") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV table: {error}") from error
    if missing := [name for name in ("status", *_RANGES) if name not in header]:
        raise UserError(f"{path} is not a table of dualsm.analysis: it has no column {', '.join(missing)}")
    for number, line in enumerate(lines, 2):  # pandas would pad the row of a truncated file
        if len(line) != len(header):
            raise UserError(f"{path}, row {number}: {len(line)} values for {len(header)} columns")
    table = pd.read_csv(
        io.StringIO(text, newline=""), keep_default_na=False, na_values=[""], float_precision="round_trip"
    )
    for name, (low, high) in _RANGES.items():
        values = table[name].tolist()
        numbers = pd.to_numeric(table[name], errors="coerce")
        for row in np.flatnonzero(table[name].notna() & ~numbers.between(low, high))[:1]:
            raise UserError(
                f"{path}, row {row + 2}: {name}={values[row]!r} must be a number from {low} to {high}"
            )
    return make_table(table)


def measures(table: DataFrame) -> list[str]:
    """Returns the columns that can serve as a score, in the order of the table."""
    others = ("/step", "/stderr")
    return [name for name in table.dropna(axis=1, how="all") if "/" in name and not name.endswith(others)]


def lower_is_better(metric: str) -> bool:
    """Returns True for the column of a loss, and False for that of a score, an acceptance or an accuracy."""
    return not metric.startswith(("task/", "acceptance/", "infilling/accuracy"))


def usable(table: DataFrame, metric: str) -> DataFrame:
    """Returns the finished cells with `metric`, R, alpha and a budget.

    Two rows with the same setting and the same seed are one run under two names; only the first is returned.

    Raises:
      TooFewCells: if there are none; the message names the available metrics or cell states.
    """
    if metric in table:
        complete = table[[metric, *_PLACE]].notna().all(axis=1)
        found = table[(table["status"] == "done") & complete]
        if len(found):
            return found[~found.duplicated([*_group_columns(found), "seed"]) | found["seed"].isna()]
    if metric not in measures(table) and measures(table):
        raise TooFewCells(f"no cell has {metric!r}; choose one of {', '.join(measures(table))}")
    counts = table["status"].astype(str).value_counts(sort=False)
    listed = ", ".join(f"{count} {status}" for status, count in counts.items()) or "no cells"
    raise TooFewCells(f"no finished cell has {metric!r} and an alpha ({listed})")


def main_budget(table: DataFrame) -> float:
    """Returns the most frequent token budget; the largest one if several are equally frequent."""
    return float(table["budget_tokens"].mode().max())


def comparable(table: DataFrame, metric: str) -> DataFrame:
    """Returns the cells that one surface can be fitted to: the usable ones with the main budget.

    If other keys (such as the learning rate) were swept too, the result has, at each (R, alpha), all
    seeds of the setting with the best mean.

    Raises:
      TooFewCells: if no cell is usable.
    """
    table = usable(table, metric)
    return _best_settings(table[table["budget_tokens"] == main_budget(table)], metric)


def drawable(table: DataFrame, metric: str) -> DataFrame:
    """Returns the cells whose curves share a plot: like `comparable`, plus unfinished and diverged cells."""
    states = table["status"].isin(["done", "running", "diverged"])
    table = table[states & table[_PLACE].notna().all(axis=1)]
    table = table[table["budget_tokens"] == main_budget(table)]
    if metric not in table:
        return table
    best = _best_settings(table[table[metric].notna()], metric)
    measured = table[metric].groupby([table[name] for name in _PLACE]).transform("count") > 0
    return table.loc[[*best.index, *table.index[~measured]]]


def on_same_tokens(table: DataFrame, unique_tokens: float, budget: float) -> DataFrame:
    """Returns the cells with the same unique tokens and a budget below `budget`.

    Each is a separate run with a complete learning-rate schedule, not an early checkpoint.
    """
    ratio = table["budget_tokens"] / table["repetitions"] / unique_tokens
    return table[(table["budget_tokens"] < budget * (1 - _TOLERANCE)) & ((ratio - 1).abs() < _TOLERANCE)]


def seed_sd(table: DataFrame, metric: str) -> float | None:
    """Returns the standard deviation of `metric` among seeds, pooled over all (R, alpha) with several seeds.

    Args:
      table: from `comparable`.
      metric: a column without missing values.

    Returns:
      The standard deviation; None if no (R, alpha) has several seeds.
    """
    groups = table.groupby(["repetitions", "alpha"])[metric]
    freedom = groups.count() - 1
    return math.sqrt((groups.var() * freedom).sum() / freedom.sum()) if freedom.sum() else None


def seed_groups(table: DataFrame) -> list[DataFrame]:
    """Splits a table into groups of cells that differ only in the seed."""
    return [group for _, group in table.groupby(_group_columns(table), dropna=False, sort=False)]


def best_group(groups: Iterable[DataFrame], metric: str) -> DataFrame:
    """Returns the group with the best mean of `metric`."""
    choose = min if lower_is_better(metric) else max
    return choose(groups, key=lambda group: group[metric].mean())


def unequal_tuning(table: DataFrame, metric: str) -> list[float]:
    """Returns each R at which the alphas were tried with different numbers of settings."""
    table = usable(table, metric)
    table = table[table["budget_tokens"] == main_budget(table)]
    settings = table.drop_duplicates(_group_columns(table)).groupby(["repetitions", "alpha"]).size()
    unequal = settings.groupby("repetitions").nunique() > 1
    return unequal.index[unequal].tolist()


def setting(group: DataFrame) -> dict:
    """Returns the known values of the swept keys of a seed group, except R, alpha, budget and seed."""
    return group[_setting_columns(group)].iloc[0].dropna().to_dict()


def _best_settings(table: DataFrame, metric: str) -> DataFrame:
    """Keeps the best setting of all other swept keys at each R, alpha and budget."""
    places = table.groupby(_PLACE, sort=False)
    return table.loc[[row for _, place in places for row in best_group(seed_groups(place), metric).index]]


def _setting_columns(table: DataFrame) -> list[str]:
    # alpha already describes the mixture, and the budget the number of steps.
    return [
        name
        for name in table
        if "/" not in name and name not in (*_FIXED, "steps") and not name.startswith("mixture.")
    ]


def _group_columns(table: DataFrame) -> list[str]:
    return [*_PLACE, *_setting_columns(table)]


def _position(column: str) -> tuple:
    """Orders columns: description of the cell, swept keys, cost of the run, measurements."""
    if column in _FIXED:
        index = _FIXED.index(column)
        return (0 if index <= _FIXED.index("seed") else 2, index)
    return (3,) if "/" in column else (1,)
