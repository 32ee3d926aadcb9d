"""Formats mixture recommendations as text."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence

from dualsm.analysis import paper_rules
from dualsm.analysis.advice import INSTALL, Advice, NamedSource, TokenBudget, mixture_flags
from dualsm.analysis.confirmed import Confirmed, describe_confirmed
from dualsm.analysis.scales import NEGLIGIBLE_DOUBLINGS, fraction
from dualsm.analysis.stopping import Side, Stopping, setting_text
from dualsm.analysis.surface import CREDIBLE, Estimate

SHIPPED_DECAY = (
    "    all its cells have weight decay 0.1; with a weight decay tuned for each mixture the best share can "
    "be higher"
)


def describe(
    token_budget: TokenBudget,
    answers: Sequence[Advice],
    sweep: str,
    source: NamedSource | None = None,
    confirmed: Confirmed | None = None,
) -> str:
    """Returns the answers of the rules and of the tables as text.

    Args:
      token_budget: the question.
      answers: from `advise`; the answer of the sweep comes first.
      sweep: path of the sweep; "" without one.
      source: the source that the question is about; None for the whole run.
      confirmed: the answer of the confirmed runs; None to leave it out.
    """
    lines = [_numbers(token_budget), *_rounding(token_budget)]
    for advice in answers:
        flags = _flags(advice, source)
        lines += _by_surface(advice, sweep, flags) if advice.surface else _by_rules(advice, flags)
    if confirmed:
        lines += describe_confirmed(confirmed, source)
    if not any(advice.surface for advice in answers):
        lines.append(
            f"the table of small models that comes with dualsm needs pandas and scikit-learn: {INSTALL}"
        )
    alphas = {advice.alpha for advice in answers} | ({confirmed.mixture.alpha} if confirmed else set())
    if len(alphas) > 1:
        own = (
            f"the first answer is from {sweep}"
            if sweep
            else "run a sweep of your own models and pass it with --sweep"
        )
        lines.append(f"the answers differ: each is valid for the model size and metric of its source; {own}")
    return "\n".join(lines)


def _numbers(token_budget: TokenBudget) -> str:
    passes = token_budget.budget_tokens / token_budget.unique_tokens
    seen = f"{passes:.4g} passes" if passes > 1 else "nothing repeats"
    budget, unique = token_budget.budget_tokens, token_budget.unique_tokens
    return f"{budget:,.0f} training tokens from {unique:,.0f} unique tokens: {seen}"


def _rounding(token_budget: TokenBudget) -> list[str]:
    """Describes the run with a whole number of repetitions if it differs from the requested one."""
    repetitions, unique = token_budget.repetitions, token_budget.unique_tokens
    fewer = 1 - token_budget.seen_tokens / token_budget.budget_tokens
    if fewer > 5e-5:  # a smaller difference would be printed as 0.00%
        return [
            f"R must be a whole number: with R = {repetitions}, train on {token_budget.seen_tokens:,.0f} "
            f"tokens, {fewer:.2%} fewer"
        ]
    if token_budget.budget_tokens > unique and token_budget.seen_unique_tokens < unique * (1 - 1e-6):
        return [
            f"R must be a whole number: with R = {repetitions}, the run sees the first "
            f"{token_budget.seen_unique_tokens:,.0f} unique tokens; to see all of them {repetitions} times, "
            f"train on {repetitions * unique:,.0f} tokens"
        ]
    return []


def describe_sources(
    budgets: Mapping[str, TokenBudget],
    answers: Mapping[str, Sequence[Advice]],
    sweep: str,
    confirmed: Mapping[str, Confirmed] = types.MappingProxyType({}),
) -> str:
    """Returns the answers for each source of a run as text.

    Args:
      budgets: name of the source -> the question.
      answers: name of the source -> answers.
      sweep: path of the sweep; "" without one.
      confirmed: name of the source -> answer of the confirmed runs; empty to leave these answers out.
    """
    total = sum(budget.seen_tokens for budget in budgets.values())
    parts = []
    for name, budget in budgets.items():
        share = budget.seen_tokens / total
        text = describe(budget, answers[name], sweep, NamedSource(name, share), confirmed.get(name))
        parts.append(f"source {name}, share {share:.4g}:\n{text}")
    decays = {found.mixture.weight_decay for found in confirmed.values()}
    if len(decays) > 1:
        low, high = min(decays), max(decays)
        parts.append(
            "a run has one weight decay for all sources; those of these answers differ "
            f"({low:g} to {high:g}): try both"
        )
    parts.append(
        "each answer is that of a run on this source alone; no run with several sources supports it, and the "
        "other sources may change the best mixture"
    )
    return "\n\n".join(parts)


def _flags(advice: Advice, source: NamedSource | None) -> list[str]:
    return [
        f"    train with: causal {fraction(advice.alpha)}, masked_diffusion {fraction(1 - advice.alpha)}",
        "    " + " ".join(mixture_flags(advice.alpha, advice.repetitions, source)),
    ]


def _by_rules(advice: Advice, flags: list[str]) -> list[str]:
    rows = "; ".join(f"{row.repetitions}: {fraction(row.alpha)}" for row in paper_rules.PAPER_RESULTS)
    return [
        f"by the rules of {paper_rules.SOURCE}, for zero-shot scores of models {_scale(advice)}:",
        *flags,
        f"    best alpha in the paper, by repetitions: {rows}",
        f"    the paper's code counts the causal loss twice: with --config.objectives.causal.weight=2.0, "
        f"{paper_rules.causal_share_of_loss(advice.alpha):.2f} of the loss is causal",
        f"    {_range(advice)}",
    ]


def _by_surface(advice: Advice, sweep: str, flags: list[str]) -> list[str]:
    found, table = advice.surface, advice.table
    low, high = map(fraction, found.interval)
    better = "lower" if table["lower_is_better"] else "higher"
    lines = [
        f"by {sweep or 'the table that comes with dualsm'}, {table['cells']} cells of "
        f"{table['budget_tokens']:,.0f} tokens, models {_scale(advice)}:",
        *flags,
        f"    best share of causal rows, {CREDIBLE:.0%} credible interval: {low} to {high}",
        *([] if sweep else [SHIPPED_DECAY]),
        f"    {table['metric']} ({better} is better): {_pm(found.score)} expected",
    ]
    for name, gain in (
        ("causal rows only", found.gain_over_causal),
        ("masked rows only", found.gain_over_masked),
    ):
        if gain is not None and gain.mean:
            lines.append(f"    better than {name} by {_pm(gain)}")
    if advice.measured:
        choose = min if table["lower_is_better"] else max
        shown = {choose(advice.measured, key=advice.measured.get), 0.0, 1.0} & advice.measured.keys()
        cells = ", ".join(f"causal {fraction(a)}: {_runs(*advice.measured[a])}" for a in sorted(shown))
        lines.append(f"    measured at R = {advice.repetitions:g}: {cells}")
    lines.append(f"    {_range(advice)}")
    if found.few_cells:
        lines.append(f"    warning: too few cells for a reliable surface ({found.few_cells})")
    if found.interval == found.tried_alphas:
        lines.append(
            "    warning: the interval is the whole range that was tried, so any share may be the best"
        )
    if table["unequally_tuned"]:
        unequal = ", ".join(f"{r:g}" for r in table["unequally_tuned"])
        lines.append(
            f"    warning: at R = {unequal} some alphas were tuned with more settings than others, "
            "and the surface compares them"
        )
    if advice.stopping:
        lines += _stopping(advice.stopping)
    return lines


def _scale(advice: Advice) -> str:
    if advice.parameters is None:
        return "of unknown size"
    low, high = advice.parameters
    return f"of {low:,.0f} parameters" if low == high else f"of {low:,.0f} to {high:,.0f} parameters"


def _range(advice: Advice) -> str:
    tried = f"{advice.tried[0]:g} to {advice.tried[1]:g} repetitions were tried"
    if advice.doublings_outside > NEGLIGIBLE_DOUBLINGS:
        distance = f"{advice.doublings_outside:.1f} doublings outside this range"
        return f"warning: {tried}; R = {advice.repetitions:g} is {distance}"
    place = "at the edge of" if advice.doublings_outside else "inside"
    return f"{tried}; R = {advice.repetitions:g} is {place} this range"


def _stopping(found: Stopping) -> list[str]:
    answer = {
        "stop early": "yes, shorter causal training was better",
        "full length": "no, shorter causal training was worse",
        "no clear difference": "shorter causal training was as good, for less compute",
        "unknown": f"unknown: {found.reason}",
    }[found.verdict]
    lines = [f"    stop earlier? {answer}"]
    for name, side in (
        ("shorter causal runs", found.shorter),
        ("the whole budget", found.full),
        ("shorter mixed runs", found.mixed),
    ):
        if side:
            lines.append(f"        {name}: {_side(side)}")
    if found.gain:
        lines.append(f"        difference {_pm(Estimate(abs(found.gain.mean), found.gain.sd))}")
    return lines


def _side(side: Side) -> str:
    tokens = (
        f"causal {fraction(side.alpha)}, {side.repetitions:g} repetitions, {side.budget_tokens:,.0f} tokens"
    )
    return f"{tokens}, {setting_text(side.setting)}: {_runs(side.score, side.runs)}"


def _runs(score: float, runs: int) -> str:
    return f"{score:.4g}" + (f" (mean of {runs} seeds)" if runs > 1 else "")


def _pm(estimate: Estimate) -> str:
    """Formats an estimate as mean ± standard deviation (2 digits), or as "at least ..." for a bound."""
    if estimate.at_least:
        return f"at least {estimate.mean:.2f}"
    digits = min(max(1 - math.floor(math.log10(estimate.sd)), 0), 6) if estimate.sd > 0 else 3
    return f"{estimate.mean:.{digits}f} ± {estimate.sd:.{digits}f}"
