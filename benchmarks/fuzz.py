"""Fuzzes all files that commands read: damages them at random and reads them.

    JAX_PLATFORMS=cpu python -m benchmarks.fuzz --cases=10000 --output=fuzz.json

A case passes if the file is read, or rejected with a one-line error, within a time limit and without leaving
partial output. Other outcomes are printed with their smallest example, and the exit status is 1.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dualsm.process import cli
from dualsm.process.progress import say, table
from tests.fuzzing.attempts import Hang, fuzz
from tests.fuzzing.commands import COMMANDS, run_damaged
from tests.fuzzing.targets import make_targets

_CASES = flags.DEFINE_integer("cases", 10_000, "number of damaged files over all targets", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", 3, "runs per command in a separate process", lower_bound=0)
_ONLY = flags.DEFINE_string("only", "", "run only the targets whose names start with this prefix")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the cases")
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")


def main(_: Sequence[str]) -> None:
    faulthandler.enable()  # a crash in a library ends this process
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        targets = make_targets(Path(scratch))
        targets = {name: target for name, target in targets.items() if name.startswith(_ONLY.value)}
        shares = sum(target.share for target in targets.values())
        for name, target in targets.items():
            cases = max(1, round(_CASES.value * target.share / shares))
            rows.append(measure(name, lambda target=target, cases=cases: fuzz(target, cases, _SEED.value)))
        for name in COMMANDS if not _ONLY.value else ():
            rows.append(measure(f"dualsm.{name}", lambda name=name: run_command(name, Path(scratch))))
    kinds = ("read", "rejected", "failed")
    total = {"target": "all"} | {key: sum(row[key] for row in rows) for key in (*kinds, "seconds")}
    cells = [
        [row["target"], *(row[kind] for kind in kinds), f"{row['seconds']:.0f}"] for row in [*rows, total]
    ]
    say(table(["target", *kinds, "s"], cells))
    if _OUTPUT.value:
        results = {"seed": _SEED.value, "total": total, "targets": rows}
        Path(_OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(1 if total["failed"] else 0)


def measure(name: str, outcomes) -> dict:
    """Runs a target; returns the counts of its outcomes and the seconds it took."""
    row = {"target": name, "read": 0, "rejected": 0, "failed": 0}
    start = time.perf_counter()
    try:
        row |= outcomes()
    except (Exception, Hang):
        say(f"{name}:\n{traceback.format_exc()}")
        row["failed"] = 1
    row["seconds"] = time.perf_counter() - start
    return row


def run_command(name: str, whole: Path) -> dict[str, int]:
    for number in range(_PROCESSES.value):
        run_damaged(name, whole, _SEED.value + number)
    return {"rejected": _PROCESSES.value}


if __name__ == "__main__":
    cli.run(main)
