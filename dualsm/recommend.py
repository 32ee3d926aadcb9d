"""Recommends a mixture for repeated data, with its uncertainty.

Without --sweep, the command prints the rules of the paper (from models of 470M parameters), followed by the
answers of two tables that come with dualsm (from models of 0.23M parameters): a sweep with one weight decay
for all shares, and the confirmed runs of docs/reproduction.md, with a tuned weight decay.

python -m dualsm.recommend --unique_tokens=1e8 --budget=3.2e9
python -m dualsm.recommend --unique_tokens=1e6 --budget=6.4e7 --sweep=runs/sweep --metric=valid/causal/loss
python -m dualsm.recommend --source=small:1e8:1.6e9 --source=large:2e9:2e9
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from absl import flags

from dualsm.analysis.advice import (
    DEFAULT_METRIC,
    Advice,
    TokenBudget,
    advise,
    parse_sources,
    round_repetitions,
)
from dualsm.analysis.advice_text import describe, describe_sources
from dualsm.analysis.confirmed import Confirmed, answer
from dualsm.analysis.methods import read_methods
from dualsm.analysis.sizes import read_sizes
from dualsm.analysis.small_share import price_at
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.output import check_output, write_output
from dualsm.process.paths import user_path

_UNIQUE = flags.DEFINE_float("unique_tokens", None, "unique tokens of the corpus", lower_bound=1)
_BUDGET = flags.DEFINE_float("budget", None, "tokens to train on, including repeated ones", lower_bound=1)
_PARAMETERS = flags.DEFINE_float(
    "parameters",
    None,
    "parameters of the model, for its distance from the confirmed runs",
    lower_bound=1,
)
_SOURCES = flags.DEFINE_multi_string(
    "source",
    [],
    "NAME:UNIQUE_TOKENS:BUDGET of a source (config.sources); repeat the flag for each source",
)
_SWEEP = cli.DEFINE_path(
    "sweep",
    "",
    "folder of a sweep, or its table.csv; default: the paper's rules and the tables that come with dualsm",
)
_METRIC = flags.DEFINE_string(
    "metric", None, f"column of the table to optimize; default: {DEFAULT_METRIC} (the rules have none)"
)
_OUTPUT = cli.DEFINE_path("output", "", "JSON file for the answer")


def main(_: Sequence[str]) -> None:
    questions = _questions()
    if _PARAMETERS.value is not None and not math.isfinite(_PARAMETERS.value):
        raise UserError(f"--parameters={_PARAMETERS.value} must be finite")
    if _METRIC.value == "":
        raise UserError(f"--metric is empty; leave it out for {DEFAULT_METRIC}")
    if _OUTPUT.value:
        check_output(user_path(_OUTPUT.value), "--output")
    budgets = {name: round_repetitions(*question) for name, question in questions.items()}
    answers = {
        name: advise(budget.repetitions, _SWEEP.value, _METRIC.value) for name, budget in budgets.items()
    }
    left_out = _why_left_out()
    confirmed = {}
    if not left_out:
        confirmed = {name: answer(budget, _PARAMETERS.value) for name, budget in budgets.items()}
    if _SOURCES.value:
        print(describe_sources(budgets, answers, _SWEEP.value, confirmed))
    else:
        print(describe(budgets[""], answers[""], _SWEEP.value, confirmed=confirmed.get("")))
    if left_out:
        print(left_out)
    if _OUTPUT.value:
        found = {name: _as_dict(budgets[name], answers[name], confirmed.get(name)) for name in budgets}
        content = {"sources": found} if _SOURCES.value else found[""]
        write_output(user_path(_OUTPUT.value), json.dumps(content, indent=1) + "\n", "--output")


def _questions() -> dict[str, tuple[float, float]]:
    """Returns the unique tokens and the budget of each source by its name, "" for a run without sources."""
    unique, budget = _UNIQUE.value, _BUDGET.value
    if not _SOURCES.value:
        if unique is None or budget is None:
            raise UserError(
                "set --unique_tokens and --budget, or --source=NAME:UNIQUE_TOKENS:BUDGET per source"
            )
        if not (math.isfinite(unique) and math.isfinite(budget)):
            raise UserError(f"--unique_tokens={unique} and --budget={budget} must be finite")
        return {"": (unique, budget)}
    if unique is not None or budget is not None:
        raise UserError("--source replaces --unique_tokens and --budget; leave them out")
    return parse_sources(_SOURCES.value)


def _why_left_out() -> str:
    """Returns why the confirmed runs do not answer; "" if they do."""
    if _SWEEP.value:
        return "the confirmed runs that come with dualsm are left out: --sweep answers from your own runs"
    if _METRIC.value not in (None, DEFAULT_METRIC):
        return (
            "the confirmed runs that come with dualsm are left out: they were chosen by held-out causal "
            f"loss, not by --metric={_METRIC.value}; leave --metric out to see them"
        )
    return ""


def _plain(value: Any) -> Any:
    """Returns nested named tuples as dicts."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    return {name: _plain(x) for name, x in value.items()} if isinstance(value, dict) else value


def _as_dict(token_budget: TokenBudget, answers: Sequence[Advice], confirmed: Confirmed | None) -> dict:
    first, *others = map(dataclasses.asdict, answers)
    content = dataclasses.asdict(token_budget) | first | {"others": others, "sweep": _SWEEP.value or None}
    if confirmed:
        content["confirmed"] = _plain(confirmed)
        content["methods"] = _plain(read_methods())
        content["sizes"] = [size._asdict() for size in read_sizes()]
        content["small_share"] = _plain(price_at(confirmed.repetitions))
    return content


if __name__ == "__main__":
    cli.run(main)
