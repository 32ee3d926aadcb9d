"""The answer to "which mixture?": where it comes from, and in words."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

from dualsm.analysis import rules
from dualsm.analysis.advice import (
    DEFAULT_METRIC,
    SHIPPED,
    Advice,
    Side,
    Stopping,
    advise_by_rules,
    advise_by_table,
)
from dualsm.analysis.scales import fraction
from dualsm.analysis.surface import CREDIBLE, Estimate
from dualsm.analysis.table import load
from dualsm.errors import UserError

_OWN_TABLE = "pip install 'dualsm[analysis]'"


def advise(repetitions: float, sweep: str | Path | None = None, metric: str | None = None) -> Advice:
    """The advice by one's own sweep, else by the shipped table if scikit-learn is there, else by the paper's
    rules.

    Args:
      repetitions: R.
      sweep: a sweep's folder or table; None takes the shipped table, where there is one.
      metric: column of the table to do best in.

    Raises:
      UserError: when the table cannot answer.
    """
    source = sweep or (SHIPPED if SHIPPED.exists() and find_spec("sklearn") else None)
    if source is not None:
        return advise_by_table(load(source), metric or DEFAULT_METRIC, repetitions)
    if metric:
        raise UserError(f"--metric={metric} needs a table: give --sweep=FOLDER, or {_OWN_TABLE}")
    return advise_by_rules(repetitions)


def describe(advice: Advice, unique: float, budget: float, sweep: str) -> str:
    """The answer in words."""
    repetitions = math.ceil(advice.repetitions - 1e-9)
    seen = f"each is seen {advice.repetitions:.4g} times" if advice.repetitions > 1 else "nothing repeats"
    lines = [
        f"{budget:,.0f} training tokens from {unique:,.0f} unique ones: {seen}",
        f"train with: causal {fraction(advice.alpha)}, masked_diffusion {fraction(1 - advice.alpha)}",
        f"    --config.mixture.causal={advice.alpha:.6g} --config.mixture.prefix=0.0 "
        f"--config.mixture.masked_diffusion={1 - advice.alpha:.6g} --config.repetitions={repetitions}",
        *(_by_surface(advice, sweep) if advice.surface else _by_rules()),
        _range(advice),
    ]
    if advice.stopping:
        lines += _stopping(advice.stopping, advice.table["metric"])
    elif advice.surface and advice.repetitions > 1:
        lines.append(
            "stop instead? the table has no shorter causal runs on the same unique tokens within an octave"
        )
    return "\n".join(lines)


def _by_rules() -> list[str]:
    rows = "; ".join(f"{row.repetitions}: {fraction(row.alpha)}" for row in rules.ROWS)
    lines = [
        f"by: the rules of {rules.SOURCE}, for zero-shot scores of models with 470M parameters",
        f"    best shares found there by repetitions: {rows}",
    ]
    if not find_spec("sklearn"):
        lines.append(f"    to ask the table that comes with dualsm instead: {_OWN_TABLE}")
    return lines


def _by_surface(advice: Advice, sweep: str) -> list[str]:
    found, table = advice.surface, advice.table
    low, high = map(fraction, found.interval)
    better = "lower" if table["lower_is_better"] else "higher"
    size = f", {table['parameters']:,.0f} parameters" if table["parameters"] else ""
    lines = [
        f"best share of causal rows, {CREDIBLE:.0%} sure: {low} to {high}",
        f"by: {sweep or 'the table that comes with dualsm'}, {table['cells']} cells of "
        f"{table['budget_tokens']:,.0f} tokens{size}",
        f"{table['metric']} ({better} is better): {_pm(found.score)} expected",
    ]
    for name, gain in (
        ("causal rows only", found.gain_over_causal),
        ("masked rows only", found.gain_over_masked),
    ):
        if gain is not None and gain.mean:
            lines.append(f"    better than {name} by {_pm(gain)}")
    rule = fraction(rules.rule_alpha(found.repetitions))
    lines.append(f"the rules of {rules.SOURCE}, from 470M parameters, say: causal {rule}")
    if found.few_cells:
        lines.append(f"warning: too few cells for a surface to be trusted ({found.few_cells})")
    return lines


def _range(advice: Advice) -> str:
    tried = f"{advice.tried[0]:g} to {advice.tried[1]:g} repetitions were tried"
    if advice.octaves_outside:
        return f"warning: {tried}; the question lies {advice.octaves_outside:.1f} doublings outside"
    return f"{tried}; the question lies inside"


def _stopping(found: Stopping, metric: str) -> list[str]:
    advice = {
        "stop early": "stop instead: shorter causal training was better",
        "full mixture": "stop instead? no: shorter causal training was worse",
        "no clear difference": "stop instead? shorter causal training did as well, for less",
    }[found.verdict]
    lines = [
        f"{advice} (same {found.unique_tokens:,.0f} unique tokens, {metric})",
        f"    causal, {_side(found.shorter)}",
        f"    causal {fraction(found.full.alpha)}, {_side(found.full)}",
        f"    difference {_pm(Estimate(abs(found.gain.mean), found.gain.sd))}",
    ]
    if found.mixed:
        lines.append(f"    a mixture that stops: causal {fraction(found.mixed.alpha)}, {_side(found.mixed)}")
    return lines


def _side(side: Side) -> str:
    seeds = f", mean of {side.runs} seeds" if side.runs > 1 else ""
    tokens = f"{side.repetitions:g} repetitions, {side.budget_tokens:,.0f} tokens"
    swept = "".join(f", {name}={value}" for name, value in side.setting.items())
    return f"{tokens}{swept}: {side.score:.4g}{seeds}"


def _pm(estimate: Estimate) -> str:
    """Mean ± standard deviation, with two digits of the deviation."""
    digits = min(max(1 - math.floor(math.log10(estimate.sd)), 0), 6) if estimate.sd > 0 else 3
    return f"{estimate.mean:.{digits}f} ± {estimate.sd:.{digits}f}"
