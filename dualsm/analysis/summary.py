"""A sweep at a glance, as text: each measure by alpha and R."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from dualsm.analysis.errors import TooFewCells
from dualsm.analysis.scales import fraction
from dualsm.analysis.table import comparable, lower_is_better, mean
from dualsm.process.progress import table
from dualsm.sweeps.cells import Row


def by_mixture(rows: Sequence[Row], metric: str) -> dict[tuple[float, float], list[Row]]:
    """(R, alpha) -> its seeds, of the cells that can be compared. Raises `TooFewCells` without any."""
    groups = defaultdict(list)
    for row in comparable(rows, metric):
        groups[row["repetitions"], row["alpha"]].append(row)
    return dict(groups)


def summary(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """A table a measure, alphas down and R across; "*" marks the best of each R, "-" what is not there."""
    parts = []
    for metric in metrics:
        try:
            groups = by_mixture(rows, metric)
        except TooFewCells:
            continue
        scores = {place: mean(group, metric) for place, group in groups.items()}
        repetitions, alphas = (sorted({place[axis] for place in scores}) for axis in (0, 1))
        choose = min if lower_is_better(metric) else max
        best = {r: choose(score for (at, _), score in scores.items() if at == r) for r in repetitions}

        def entry(r: float, alpha: float, scores=scores, best=best) -> str:
            score = scores.get((r, alpha))
            return "- " if score is None else f"{score:.3f}{'*' if score == best[r] else ' '}"

        lines = [[fraction(alpha), *(entry(r, alpha) for r in repetitions)] for alpha in alphas]
        parts.append(f"{metric}\n" + table(["alpha", *(f"R {r:g} " for r in repetitions)], lines))
    return "\n\n".join(parts)
