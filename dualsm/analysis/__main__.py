"""Writes the table and the plots of a sweep into its folder, and prints its measures by alpha and R.

python -m dualsm.analysis --sweep=runs/sweep
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from dualsm.analysis.report import as_text, report
from dualsm.process import cli

_SWEEP = cli.DEFINE_path("sweep", None, "folder of the sweep; it need not be finished")
flags.mark_flags_as_required(["sweep"])


def main(_: Sequence[str]) -> None:
    for path in report(_SWEEP.value):
        print(path)
    print(as_text(_SWEEP.value))


if __name__ == "__main__":
    cli.run(main)
