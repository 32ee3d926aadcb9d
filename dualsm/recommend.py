"""Recommends a mixture for repeated data, with its uncertainty.

Without --sweep, the command prints the rules of the paper (from models of 470M parameters), followed by the
answer of the table that comes with dualsm (from models of 0.23M parameters).

python -m dualsm.recommend --unique_tokens=1e8 --budget=3.2e9
python -m dualsm.recommend --unique_tokens=1e6 --budget=6.4e7 --sweep=runs/sweep --metric=valid/causal/loss
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dualsm.analysis.advice import DEFAULT_METRIC, advise, round_repetitions
from dualsm.analysis.advice_text import describe
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.output import check_output, write_output

_UNIQUE = flags.DEFINE_float("unique_tokens", None, "unique tokens of the corpus", lower_bound=1)
_BUDGET = flags.DEFINE_float("budget", None, "tokens to train on, including repeated ones", lower_bound=1)
_SWEEP = cli.DEFINE_path(
    "sweep",
    "",
    "folder of a sweep, or its table.csv; default: the paper's rules and the table that comes with dualsm",
)
_METRIC = flags.DEFINE_string(
    "metric", None, f"column of the table to optimize; default: {DEFAULT_METRIC} (the rules have none)"
)
_OUTPUT = cli.DEFINE_path("output", "", "JSON file for the answer")
flags.mark_flags_as_required(["unique_tokens", "budget"])


def main(_: Sequence[str]) -> None:
    unique, budget = _UNIQUE.value, _BUDGET.value
    if not (math.isfinite(unique) and math.isfinite(budget)):
        raise UserError(f"--unique_tokens={unique} and --budget={budget} must be finite")
    if _OUTPUT.value:
        check_output(Path(_OUTPUT.value), "--output")
    token_budget = round_repetitions(unique, budget)
    answers = advise(token_budget.repetitions, _SWEEP.value, _METRIC.value)
    print(describe(token_budget, answers, _SWEEP.value))
    if _OUTPUT.value:
        first, *others = map(dataclasses.asdict, answers)
        answer = dataclasses.asdict(token_budget) | first | {"others": others, "sweep": _SWEEP.value or None}
        write_output(Path(_OUTPUT.value), json.dumps(answer, indent=1) + "\n", "--output")


if __name__ == "__main__":
    cli.run(main)
