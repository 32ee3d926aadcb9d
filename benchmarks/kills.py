"""Kills and resumes small runs at random moments, and compares the results with an uninterrupted run.

    JAX_PLATFORMS=cpu python -m benchmarks.kills --kills=200

Exits with status 1 if a killed run differs from the uninterrupted run.
"""

from __future__ import annotations

import collections
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dualsm.process import cli
from dualsm.process.progress import bar, say, table
from tests.fuzzing.artifacts import real_texts
from tests.fuzzing.corpora import make_corpus
from tests.killing import STAGES, Kill, Killing, problems

_KILLS = flags.DEFINE_integer("kills", 200, "number of kills", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the moments")
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")


def main(_: Sequence[str]) -> None:
    start, rng, runs = time.perf_counter(), random.Random(_SEED.value), []
    with tempfile.TemporaryDirectory() as scratch, bar(total=_KILLS.value, unit="kill") as progress:
        folder = Path(scratch)
        killing = Killing(make_corpus(folder, real_texts("json/*.py")), folder / "cache")
        killing.finish(folder / "warm")  # compiles
        seconds = killing.finish(folder / "reference")
        while progress.n < _KILLS.value:
            workdir = folder / f"run{len(runs)}"
            kills = killing.kill_until_done(workdir, rng, seconds, _KILLS.value - progress.n)
            runs.append((kills, problems(kills, workdir, folder / "reference")))
            progress.update(len(kills))
    results = summary(runs) | {"checkpoint_every": killing.config.checkpoint.every}
    results |= {"run_seconds": seconds[0], "seconds": time.perf_counter() - start, "seed": _SEED.value}
    show(results)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n")
    if results["problems"]:
        sys.exit(1)


def summary(runs: list[tuple[list[Kill], list[str]]]) -> dict:
    """Returns statistics over all runs."""
    kills = [kill for killed, _ in runs for kill in killed]
    stages = collections.Counter(kill.stage for kill in kills)
    return {
        "kills": len(kills),
        "runs": len(runs),
        "stages": {stage: stages[stage] for stage in STAGES},
        "while_a_checkpoint_was_written": sum(kill.half for kill in kills),
        "recomputed_mean": sum(kill.recomputed for kill in kills) / len(kills),
        "recomputed_most": max(kill.recomputed for kill in kills),
        "recomputed_most_with_no_save_under_way": max((k.recomputed for k in kills if not k.half), default=0),
        "problems": [problem for _, found in runs for problem in found],
    }


def show(results: dict) -> None:
    rows = [
        ["kills", results["kills"]],
        *([f"  while {stage}", count] for stage, count in results["stages"].items()),
        ["  with a partly written checkpoint", results["while_a_checkpoint_was_written"]],
        ["completed runs", results["runs"]],
        ["steps between checkpoints", results["checkpoint_every"]],
        ["steps recomputed per kill, mean", f"{results['recomputed_mean']:.1f}"],
        ["  maximum, no save in progress", results["recomputed_most_with_no_save_under_way"]],
        ["  maximum, a save in progress", results["recomputed_most"]],
        ["differences from the uninterrupted run", len(results["problems"])],
    ]
    say(table(["", "count"], rows))
    for problem in results["problems"]:
        say(problem)


if __name__ == "__main__":
    cli.run(main)
