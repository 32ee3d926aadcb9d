"""Answers from the confirmed runs of docs/reproduction.md, whose table comes with dualsm.

Each share of causal rows has its best weight decay. Settings were chosen on another corpus and held-out split
than the losses are from. The table covers R = 32 and R = 128; `answer` uses the nearest.

Losses and differences are means over corpora, after the mean over the seeds of each; their standard errors
are over corpora. Intervals are those of Student's t distribution. Runs that diverged are counted and left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.special import stdtrit

from dualsm.analysis.advice import NamedSource, TokenBudget, mixture_flags
from dualsm.analysis.methods import ConfirmedMethod, read_methods
from dualsm.analysis.scales import NEGLIGIBLE_DOUBLINGS, doublings_outside, fraction
from dualsm.analysis.shipped_rows import read_rows
from dualsm.analysis.sizes import read_sizes
from dualsm.analysis.small_share import describe_small_share, price_at

TABLE = Path(__file__).with_name("confirmed.csv")  # written by docs/reproduction/page.py
INTERVAL = 0.8  # probability that a stated interval contains the expected value


class ConfirmedCell(NamedTuple):
    """Runs with one setting, at one number of repetitions.

    Attributes:
      repetitions: R of a run with the whole budget.
      unique_tokens, budget_tokens, parameters: of a run with the whole budget.
      alpha: share of causal rows; all others are masked diffusion.
      weight_decay: weight decay.
      length: share of the budget that was trained, with a complete learning-rate schedule.
      replicates: number of runs, on several corpora.
      diverged: number of them that diverged; the losses are those of the others.
      corpora: number of corpora with a run that did not diverge.
      causal, causal_error: held-out causal loss in nats per token, and its standard error.
      masked, masked_error: the same of the masked-diffusion loss.
      paired_corpora: number of corpora on which neither this cell nor causal rows only diverged.
      causal_change, causal_change_error: causal loss minus that of causal rows only at their best stop, with
        the same corpora and seeds, and its standard error; 0 for that cell itself.
      masked_change, masked_change_error: the same of the masked-diffusion loss.
      roles: names, separated by spaces, of the fields of `Confirmed` that the cell was chosen for.
    """

    repetitions: int
    unique_tokens: int
    budget_tokens: int
    parameters: int
    alpha: float
    weight_decay: float
    length: float
    replicates: int
    diverged: int
    corpora: int
    causal: float
    causal_error: float
    masked: float
    masked_error: float
    paired_corpora: int
    causal_change: float
    causal_change_error: float
    masked_change: float
    masked_change_error: float
    roles: str


class Confirmed(NamedTuple):
    """The cells that determine the answer, all at the nearest R.

    Attributes:
      repetitions: R of the question.
      mixture: the best mixture, at its best stop.
      causal: causal rows only, for the whole budget.
      causal_stop: causal rows only, at their best stop.
      second_mode: the mixture with the largest share of causal rows, at its best stop.
      outside: distance of the question from the runs, in doublings: from the nearest R, and from the range of
        unique tokens, training tokens and, if known, parameters.
    """

    repetitions: int
    mixture: ConfirmedCell
    causal: ConfirmedCell
    causal_stop: ConfirmedCell
    second_mode: ConfirmedCell
    outside: dict[str, float]


def read_confirmed(path: Path = TABLE) -> list[ConfirmedCell]:
    """Returns all cells of the table."""
    return read_rows(path, ConfirmedCell)


def half_interval(error: float, corpora: int) -> float:
    """Returns half the width of the interval of a mean, given its standard error over `corpora` corpora."""
    return float(stdtrit(corpora - 1, (1 + INTERVAL) / 2)) * error


def answer(
    token_budget: TokenBudget,
    parameters: float | None = None,
    cells: Sequence[ConfirmedCell] | None = None,
) -> Confirmed:
    """Returns the answer of the cells with the nearest number of repetitions.

    Args:
      token_budget: the question.
      parameters: size of the model; None if unknown.
      cells: the cells; None: the table that comes with dualsm.
    """
    cells = read_confirmed() if cells is None else cells
    asked = token_budget.repetitions
    tried = sorted({cell.repetitions for cell in cells}, reverse=True)  # of two equally near, the larger
    nearest = min(tried, key=lambda r: doublings_outside(asked, r, r))
    by_role = {role: cell for cell in cells if cell.repetitions == nearest for role in cell.roles.split()}
    outside = {"repetitions": doublings_outside(asked, nearest, nearest)}
    for name, value in (
        ("unique_tokens", token_budget.seen_unique_tokens),
        ("budget_tokens", token_budget.seen_tokens),
        ("parameters", parameters),
    ):
        if value is not None:
            values = [getattr(cell, name) for cell in cells]
            outside[name] = doublings_outside(value, min(values), max(values))
    return Confirmed(asked, **by_role, outside=outside)


def describe_confirmed(found: Confirmed, source: NamedSource | None = None) -> list[str]:
    """Returns the answer as lines of text.

    Args:
      found: the answer.
      source: the source that the question is about; None for the whole run.
    """
    best, stop, second = found.mixture, found.causal_stop, found.second_mode
    flags = mixture_flags(best.alpha, found.repetitions, source)
    if source is None:
        flags.append(f"--config.optimizer.weight_decay={best.weight_decay:g}")
    lines = [
        f"by the confirmed runs that come with dualsm, {best.budget_tokens:,} training tokens, "
        f"{best.unique_tokens:,} unique tokens (R = {best.repetitions}), {best.parameters:,} parameters, "
        f"{best.replicates} runs per setting on {best.corpora} corpora, ± half an {INTERVAL:.0%} interval:",
        f"    train with: causal {fraction(best.alpha)}, masked_diffusion {fraction(1 - best.alpha)}, "
        f"weight decay {best.weight_decay:g}{' (of the whole run)' if source else ''}, {_stop(best)}",
        "    " + " ".join(flags),
        f"    causal and masked-diffusion loss: {_losses(best)}{_diverged(best)}",
    ]
    for cell in dict.fromkeys((found.causal, stop)):
        setting = f"weight decay {cell.weight_decay:g}, {_stop(cell)}"
        lines.append(f"    causal rows only, {setting}: {_losses(cell)}{_diverged(cell)}")
    causal = _estimate(second.causal_change, second.causal_change_error, second.paired_corpora, "+")
    masked = _estimate(second.masked_change, second.masked_change_error, second.paired_corpora, "+")
    lines.append(
        f"    price of a second mode, each at its best stop: causal {fraction(second.alpha)} changes the "
        f"causal loss by {causal} and the masked-diffusion loss by {masked}"
    )
    far = [
        f"{name.replace('_', ' ')} by {x:.1f}"
        for name, x in found.outside.items()
        if x > NEGLIGIBLE_DOUBLINGS
    ]
    if far:
        lines.append(f"    warning: the question is outside these runs, in doublings: {', '.join(far)}")
    if "parameters" not in found.outside:
        lines.append("    size not given: set --parameters for its distance from the size of these models")
    lines += _describe_methods()
    lines += _describe_sizes(best.parameters)
    if price := price_at(found.repetitions):
        lines.append(describe_small_share(price))
    lines.append("    other learning rates: see docs/reproduction.md")
    return lines


def _describe_methods() -> list[str]:
    """Returns lines about the runs with dropout and with a weight decay that was tried after the study."""
    methods = read_methods()
    first = methods["causal dropout"]
    lines = [
        f"    other methods (R = {first.repetitions}, {first.replicates} runs per setting on {first.corpora} "
        "corpora), and the change in causal loss from the mixture:"
    ]
    for key, name in (
        ("causal dropout", "causal rows only"),
        ("mixture dropout", f"mixture, causal {fraction(methods['mixture dropout'].alpha)}"),
        ("causal finer", "causal rows only"),
        ("mir", "MIR (each row a second time, with masked inputs)"),
    ):
        method = methods[key]
        change = _estimate(method.causal_change, method.causal_change_error, method.corpora, "+")
        dropout = f"dropout {method.dropout:g}, " if method.dropout else ""
        stop = _stop(method)
        if method.compute != method.length:
            stop = f"{fraction(method.length)} of the tokens, {method.compute:g} x the compute of a full run"
        setting = f"{dropout}weight decay {method.weight_decay:g}, {stop}"
        lines.append(f"        {name}, {setting}: {_losses(method)}; change {change}")
    return lines


def _describe_sizes(tuned: int) -> list[str]:
    """Returns lines about models of several sizes with the settings of models with `tuned` parameters."""
    sizes = read_sizes()
    first = sizes[0]
    lines = [
        f"    by size (R = {first.repetitions}, with the best settings for {tuned:,} parameters), causal "
        "loss of the mixture minus that of causal rows only, lowest to highest:"
    ]
    for size in sizes:
        compute = f"{size.compute_lowest:+.3f} to {size.compute_highest:+.3f}"
        stop = f"{size.stop_lowest:+.3f} to {size.stop_highest:+.3f}"
        lines.append(
            f"        {size.parameters:,} parameters, {size.budget_tokens:,} tokens, {size.corpora} corpora: "
            f"{compute} at equal compute, {stop} each at its best stop"
        )
    return lines


def _stop(cell: ConfirmedCell | ConfirmedMethod) -> str:
    if cell.length == 1:
        return "no early stop"
    return f"stopped at {fraction(cell.length)} of the tokens (of config.steps and config.repetitions)"


def _losses(cell: ConfirmedCell | ConfirmedMethod) -> str:
    losses = ((cell.causal, cell.causal_error), (cell.masked, cell.masked_error))
    return " and ".join(_estimate(*loss, cell.corpora) for loss in losses)


def _diverged(cell: ConfirmedCell) -> str:
    return f" ({cell.diverged} of {cell.replicates} runs diverged)" if cell.diverged else ""


def _estimate(value: float, error: float, corpora: int, sign: str = "") -> str:
    return f"{value:{sign}.3f} ± {half_interval(error, corpora):.3f}"
