"""Answers from the confirmed runs of docs/reproduction.md, whose table comes with dualsm.

In these runs every share has its best weight decay, and settings were chosen on other text than the losses
are from. They have two numbers of repetitions only, so the answer is that of the nearest one.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dualsm.analysis.scales import doublings_outside, fraction

TABLE = Path(__file__).with_name("confirmed.csv")  # written by docs/reproduction/page.py
_INTEGERS = ("repetitions", "unique_tokens", "budget_tokens", "parameters", "replicates")


class ConfirmedCell(NamedTuple):
    """Runs with one setting, at one number of repetitions.

    Attributes:
      repetitions: R of a run with the whole budget.
      unique_tokens, budget_tokens, parameters: of a run with the whole budget.
      alpha: share of causal rows; all others are masked diffusion.
      weight_decay: weight decay.
      length: share of the budget that was trained, with a complete learning-rate schedule.
      replicates: number of runs, on several corpora.
      causal, causal_error: held-out causal loss in nats per token, and its standard error.
      masked, masked_error: the same of the masked-diffusion loss.
    """

    repetitions: int
    unique_tokens: int
    budget_tokens: int
    parameters: int
    alpha: float
    weight_decay: float
    length: float
    replicates: int
    causal: float
    causal_error: float
    masked: float
    masked_error: float


class Confirmed(NamedTuple):
    """The cells of the nearest number of repetitions that decide.

    Attributes:
      mixture: the mixture with the lowest causal loss.
      causal_only: causal rows only, for the whole budget.
      causal_stopped: causal rows only, for a part of the budget; None if that was not better.
      second_mode: the mixture with the largest share of causal rows, for the whole budget.
      outside: distance of the question from the runs, in doublings, of repetitions, unique tokens, training
        tokens and, if known, parameters.
    """

    mixture: ConfirmedCell
    causal_only: ConfirmedCell
    causal_stopped: ConfirmedCell | None
    second_mode: ConfirmedCell
    outside: dict[str, float]


def read_confirmed(path: Path = TABLE) -> list[ConfirmedCell]:
    """Returns all cells of the table."""
    with path.open(newline="") as file:
        return [
            ConfirmedCell(**{name: (int if name in _INTEGERS else float)(text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def answer(
    unique_tokens: float,
    budget_tokens: float,
    parameters: float | None = None,
    cells: Sequence[ConfirmedCell] | None = None,
) -> Confirmed:
    """Returns the answer of the cells with the nearest number of repetitions.

    Args:
      unique_tokens, budget_tokens: size of the corpus, and tokens to train on.
      parameters: size of the model; None if unknown.
      cells: the cells; None: the table that comes with dualsm.
    """
    cells = read_confirmed() if cells is None else cells
    repetitions = max(budget_tokens / unique_tokens, 1)
    nearest = min({cell.repetitions for cell in cells}, key=lambda r: doublings_outside(repetitions, r, r))
    here = [cell for cell in cells if cell.repetitions == nearest]
    mixtures = [cell for cell in here if cell.alpha < 1]
    causal_only = next(cell for cell in here if cell.alpha == 1 and cell.length == 1)
    shorter = [cell for cell in here if cell.alpha == 1 and cell.length < 1]
    stopped = min(shorter, key=lambda cell: cell.causal, default=None)
    return Confirmed(
        mixture=min(mixtures, key=lambda cell: cell.causal),
        causal_only=causal_only,
        causal_stopped=stopped if stopped and stopped.causal < causal_only.causal else None,
        second_mode=max((cell for cell in mixtures if cell.length == 1), key=lambda cell: cell.alpha),
        outside=_outside(cells, repetitions, unique_tokens, budget_tokens, parameters),
    )


def _outside(cells, repetitions, unique_tokens, budget_tokens, parameters) -> dict[str, float]:
    asked = {
        "repetitions": repetitions,
        "unique_tokens": unique_tokens,
        "budget_tokens": budget_tokens,
        "parameters": parameters,
    }
    found = {}
    for name, value in asked.items():
        if value is not None:
            tried = [getattr(cell, name) for cell in cells]
            found[name] = doublings_outside(value, min(tried), max(tried))
    return found


def describe_confirmed(found: Confirmed) -> list[str]:
    """Returns the answer as lines of text."""
    best, only, stopped, second = found.mixture, found.causal_only, found.causal_stopped, found.second_mode
    flags = {
        "mixture.causal": best.alpha,
        "mixture.masked_diffusion": 1 - best.alpha,
        "optimizer.weight_decay": best.weight_decay,
        "repetitions": best.repetitions * best.length,
    }
    lines = [
        f"by the confirmed runs that come with dualsm, {best.budget_tokens:,} training tokens, "
        f"{best.unique_tokens:,} unique tokens (R = {best.repetitions}), {best.parameters:,} parameters, "
        f"{best.replicates} runs per setting:",
        f"    train with: causal {fraction(best.alpha)}, masked_diffusion {fraction(1 - best.alpha)}, "
        f"weight decay {best.weight_decay:g}{_stop(best)}",
        "    " + " ".join(f"--config.{name}={value:.6g}" for name, value in flags.items()),
        f"    causal loss {_loss(best.causal, best.causal_error)}, "
        f"masked-diffusion loss {_loss(best.masked, best.masked_error)}",
        f"    causal rows only, weight decay {only.weight_decay:g}: "
        f"{_loss(only.causal, only.causal_error)} and {_loss(only.masked, only.masked_error)}",
    ]
    if stopped:
        lines.append(
            f"    causal rows only, weight decay {stopped.weight_decay:g}{_stop(stopped)}: "
            f"{_loss(stopped.causal, stopped.causal_error)} and {_loss(stopped.masked, stopped.masked_error)}"
        )
    price = second.causal - only.causal
    lines.append(
        f"    price of a second mode: causal {fraction(second.alpha)} changes the causal loss by "
        f"{price:+.3f} and the masked-diffusion loss by {second.masked - only.masked:+.2f}"
    )
    far = [f"{name.replace('_', ' ')} by {x:.1f}" for name, x in found.outside.items() if x]
    if far:
        lines.append(f"    warning: the question is outside these runs, in doublings: {', '.join(far)}")
    lines.append("    dropout and other sizes have not been confirmed; see docs/reproduction.md")
    return lines


def _stop(cell: ConfirmedCell) -> str:
    if cell.length == 1:
        return ", no early stop"
    return f", stopped after {cell.repetitions * cell.length:g} repetitions"


def _loss(mean: float, error: float) -> str:
    return f"{mean:.3f} ± {error:.3f}"
