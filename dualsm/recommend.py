"""Says which mixture to train with when data must repeat, and how sure that is.

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

from dualsm import cli
from dualsm.analysis.advice import DEFAULT_METRIC
from dualsm.analysis.answer import advise, describe
from dualsm.errors import UserError
from dualsm.output import check_output, write_output

_UNIQUE = flags.DEFINE_float("unique_tokens", None, "tokens of text there are", lower_bound=1)
_BUDGET = flags.DEFINE_float("budget", None, "tokens to train on, repeated ones included", lower_bound=1)
_SWEEP = cli.DEFINE_path(
    "sweep", "", "folder of a sweep, or its table.csv; default: the table that comes with dualsm, if any"
)
_METRIC = flags.DEFINE_string(
    "metric", None, f"column of the table to do best in; default: {DEFAULT_METRIC} (the paper's rules: none)"
)
_OUTPUT = cli.DEFINE_path("output", "", "JSON file for the answer")
flags.mark_flags_as_required(["unique_tokens", "budget"])


def main(_: Sequence[str]) -> None:
    unique, budget = _UNIQUE.value, _BUDGET.value
    if not (math.isfinite(unique) and math.isfinite(budget)):
        raise UserError(f"--unique_tokens={unique} and --budget={budget} must be finite numbers")
    if _OUTPUT.value:
        check_output(Path(_OUTPUT.value), "--output")
    advice = advise(max(budget / unique, 1.0), _SWEEP.value, _METRIC.value)
    print(describe(advice, unique, budget, _SWEEP.value))
    if _OUTPUT.value:
        answer = {"unique_tokens": unique, "budget_tokens": budget} | dataclasses.asdict(advice)
        text = json.dumps(answer | {"sweep": _SWEEP.value or None}, indent=1) + "\n"
        write_output(Path(_OUTPUT.value), text, "--output")


if __name__ == "__main__":
    cli.run(main)
