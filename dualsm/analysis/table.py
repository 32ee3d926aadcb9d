"""A table of cells on disk, and which of its rows can be compared with each other."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from dualsm.analysis.analysis_errors import TooFewCells
from dualsm.process.errors import UserError
from dualsm.sweeps.cells import Row, collect

TABLE = "table.csv"
# Columns that are no swept keys; those of measurements have a "/" in their names.
_FIXED = (
    "name", "status", "reason", "repetitions", "alpha", "seed",
    "budget_tokens", "unique_tokens", "parameters", "seconds", "step",
)  # fmt: skip
_RANGES = {"repetitions": (1, math.inf), "alpha": (0, 1), "budget_tokens": (1, math.inf)}
_SAME = 0.02  # share by which unique tokens may differ and count as equal (they are rounded to whole rows)


def load(source: str | Path) -> list[Row]:
    """The rows of a sweep's folder, or of a CSV file that `write_table` made of one.

    Raises:
      UserError: when it is neither.
    """
    return collect(source) if Path(source).is_dir() else read_table(source)


def write_table(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes rows as CSV, missing values empty; `read_table` gives them back as they are."""
    columns = sorted(dict.fromkeys(name for row in rows for name in row), key=_place)
    path = Path(path)
    aside = path.with_suffix(".partial")
    with aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([_to_text(row.get(name)) for name in columns] for row in rows)
    aside.replace(path)


def read_table(path: str | Path) -> list[Row]:
    """The rows of a CSV file; missing values are None.

    Raises:
      UserError: when it cannot be read or is no table of cells.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file, strict=True) if line]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a sweep's folder or its {TABLE}") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is no CSV table: {error}") from error
    header = lines[0] if lines else []
    missing = [name for name in ("status", *_RANGES) if name not in header]
    if missing:
        raise UserError(f"{path} is no table of dualsm.analysis: it has no column {', '.join(missing)}")
    return [_read_row(line, header, f"{path}, row {number}") for number, line in enumerate(lines[1:], 2)]


def _read_row(line: list[str], header: list[str], where: str) -> Row:
    if len(line) != len(header):
        raise UserError(f"{where}: {len(line)} values for {len(header)} columns")
    row = {name: _from_text(text) for name, text in zip(header, line, strict=True)}
    for name, (low, high) in _RANGES.items():
        if row[name] is not None and not (_is_number(row[name]) and low <= row[name] <= high):
            raise UserError(f"{where}: {name}={row[name]!r} must be a number from {low} to {high}")
    return row


def measures(rows: Sequence[Row]) -> list[str]:
    """The columns that can be asked for as a score, in the order of the table."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    return [name for name in names if "/" in name and not name.endswith("/step")]


def lower_is_better(metric: str) -> bool:
    """Whether a column of the table is a loss (and not a score of a task)."""
    return not metric.startswith("task/")


def usable(rows: Sequence[Row], metric: str) -> list[Row]:
    """The finished cells that have a value of `metric`, R, alpha and a budget; each run counts once.

    Raises:
      TooFewCells: when there are none, with what there is instead.
    """
    found = [
        row
        for row in rows
        if row["status"] == "done"
        and all(_is_number(row.get(name)) for name in (metric, "repetitions", "alpha", "budget_tokens"))
    ]
    if found:
        return _without_duplicates(found)
    if metric not in measures(rows) and measures(rows):
        raise TooFewCells(f"no cell has {metric!r}; there are {', '.join(measures(rows))}")
    states = Counter(str(row["status"]) for row in rows)
    listed = ", ".join(f"{count} {status}" for status, count in states.items()) or "no cells"
    raise TooFewCells(f"no finished cell has {metric!r} and an alpha ({listed})")


def _without_duplicates(rows: Sequence[Row]) -> list[Row]:
    """Of rows with the same seed and setting, which are the same run under two names, the first."""
    kept = {}
    for number, row in enumerate(rows):
        seed = number if row.get("seed") is None else f"seed {row['seed']}"
        kept.setdefault((row["repetitions"], row["alpha"], row["budget_tokens"], _setting(row), seed), row)
    return list(kept.values())


def main_budget(rows: Sequence[Row]) -> int:
    """The token budget that most of the rows have; of equally frequent ones the largest."""
    counts = Counter(row["budget_tokens"] for row in rows)
    return max(counts, key=lambda budget: (counts[budget], budget))


def comparable(rows: Sequence[Row], metric: str) -> list[Row]:
    """The cells that one surface can be fitted to: usable ones, all of the main budget.

    Where other keys were swept, too (a learning rate, say), each (R, alpha) comes with the setting of them
    that is best there by its mean over seeds; all its seeds are kept.
    """
    rows = usable(rows, metric)
    budget = main_budget(rows)
    rows = [row for row in rows if row["budget_tokens"] == budget]
    return [row for group in _best_settings(rows, metric).values() for row in group]


def by_mixture(rows: Sequence[Row], metric: str) -> dict[tuple[float, float], list[Row]]:
    """(R, alpha) -> its seeds, of the cells that can be compared. Raises `TooFewCells` without any."""
    groups = defaultdict(list)
    for row in comparable(rows, metric):
        groups[row["repetitions"], row["alpha"]].append(row)
    return dict(groups)


def drawable(rows: Sequence[Row], metric: str) -> list[Row]:
    """The cells whose curves belong into one plot: as `comparable`, but unfinished and diverged ones, too."""
    rows = [
        row
        for row in rows
        if row["status"] in ("done", "running", "diverged")
        and all(_is_number(row.get(name)) for name in ("repetitions", "alpha", "budget_tokens"))
    ]
    budget = main_budget(rows) if rows else None
    rows = [row for row in rows if row["budget_tokens"] == budget]
    best = _best_settings([row for row in rows if _is_number(row.get(metric))], metric)
    without = [row for row in rows if (row["repetitions"], row["alpha"], budget) not in best]
    return [row for group in best.values() for row in group] + without


def on_same_tokens(rows: Sequence[Row], unique_tokens: float, budget: float) -> list[Row]:
    """The rows with the same unique tokens that ended at a smaller budget.

    Each has ended its own learning-rate schedule: it is another run, not an early checkpoint.
    """
    return [
        row
        for row in rows
        if row["budget_tokens"] < budget * (1 - _SAME)
        and abs(row["budget_tokens"] / row["repetitions"] / unique_tokens - 1) < _SAME
    ]


def mean(rows: Sequence[Row], metric: str) -> float:
    """The mean of a column over rows that all have it."""
    return statistics.fmean(row[metric] for row in rows)


def seed_sd(rows: Sequence[Row], metric: str) -> float | None:
    """Standard deviation of a column among seeds, pooled over all cells that have several; None without any.

    Args:
      rows: from `comparable`.
      metric: a column that all rows have.
    """
    seeds = defaultdict(list)
    for row in rows:
        seeds[row["repetitions"], row["alpha"]].append(row[metric])
    several = [values for values in seeds.values() if len(values) > 1]
    if not several:
        return None
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in several)
    return math.sqrt(squares / sum(len(values) - 1 for values in several))


def seed_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows in groups that differ in nothing but the seed."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["repetitions"], row["alpha"], row["budget_tokens"], _setting(row)].append(row)
    return list(groups.values())


def best_group(groups: Iterable[Sequence[Row]], metric: str) -> Sequence[Row]:
    """The group with the best mean."""
    choose = min if lower_is_better(metric) else max
    return choose(groups, key=lambda group: mean(group, metric))


def unequal_tuning(rows: Sequence[Row], metric: str) -> list[float]:
    """The R at which one alpha was tried with more settings of the other swept keys than another."""
    rows = usable(rows, metric)
    budget = main_budget(rows)
    tried = defaultdict(lambda: defaultdict(set))
    for row in rows:
        if row["budget_tokens"] == budget:
            tried[row["repetitions"]][row["alpha"]].add(_setting(row))
    return sorted(r for r, alphas in tried.items() if len({len(found) for found in alphas.values()}) > 1)


def _best_settings(rows: Sequence[Row], metric: str) -> dict[tuple, list[Row]]:
    """(R, alpha, budget) -> the rows of the best setting of all other swept keys there."""
    places = defaultdict(list)
    for group in seed_groups(rows):
        places[group[0]["repetitions"], group[0]["alpha"], group[0]["budget_tokens"]].append(group)
    return {place: best_group(groups, metric) for place, groups in places.items()}


def setting(row: Row) -> dict:
    """A cell's swept keys, as far as they are known, except those of R, alpha, the seed and the budget."""
    return {
        name: value
        for name, value in row.items()
        if value is not None
        and "/" not in name
        and name not in (*_FIXED, "steps")
        and not name.startswith("mixture.")
    }


def _setting(row: Row) -> str:
    """The same, to group by; 1 and 1.0 are equal."""
    values = {n: int(v) if isinstance(v, float) and v.is_integer() else v for n, v in setting(row).items()}
    return json.dumps(values, sort_keys=True, default=str)


def _place(column: str) -> tuple[int, ...]:
    """Fixed columns about what a cell is, swept keys, fixed columns about what it took, measurements."""
    if column in _FIXED:
        place = _FIXED.index(column)
        return (0 if place <= _FIXED.index("seed") else 2, place)
    return (3,) if "/" in column else (1,)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _to_text(value) -> str:
    """A value as a field: strings as they are, unless they would be read as something else."""
    if value is None:
        return ""
    if isinstance(value, str) and value and _from_text(value) == value:
        return value
    return json.dumps(value)


def _from_text(text: str):
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
