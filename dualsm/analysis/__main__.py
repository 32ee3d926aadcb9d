"""Writes the table and plots of a sweep into its folder, and prints its metrics by alpha and R.

python -m dualsm.analysis --sweep=runs/sweep
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from dualsm.analysis.plots import COSTS
from dualsm.analysis.sweep_report import report, report_text
from dualsm.process import cli

_SWEEP = cli.DEFINE_path("sweep", None, "folder of the sweep, which may be unfinished")
_COST = flags.DEFINE_enum("cost", "tokens", list(COSTS), "x axis of the loss curves")
flags.mark_flags_as_required(["sweep"])


def main(_: Sequence[str]) -> None:
    for path in report(_SWEEP.value, _COST.value):
        print(path)
    print(report_text(_SWEEP.value))


if __name__ == "__main__":
    cli.run(main)
