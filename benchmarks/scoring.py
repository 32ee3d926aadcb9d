"""Measures the time and the accuracy of scoring BLiMP pairs in each mode.

    python benchmarks/scoring.py --workdir=runs/tiny --task_data=eval --pairs=1000

The compilation cache is disabled. If the load shows other activity on the machine, compare CPU seconds, which
count this process only; they are meaningless on accelerators.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from dualsm.config import freeze
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Scorer
from dualsm.evaluation.task_formats import Question
from dualsm.evaluation.task_metrics import compute_metrics
from dualsm.evaluation.tasks import load_task
from dualsm.process import cli
from dualsm.process.progress import say, table
from dualsm.rundir.trained_run import open_run

_WORKDIR = cli.DEFINE_path("workdir", None, "run directory")
_TASK_DATA = cli.DEFINE_path("task_data", None, "folder that contains blimp/*.jsonl")
_PAIRS = flags.DEFINE_integer("pairs", 1000, "number of pairs, evenly spaced over all files", lower_bound=2)
_SAMPLES = flags.DEFINE_integer("samples", 128, "Monte Carlo samples; 0 skips this mode", lower_bound=0)
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")
flags.mark_flags_as_required(["workdir", "task_data"])


def measure(scorer: Scorer, questions: Sequence[Question], scoring: ScoringParams) -> dict:
    """Measures one mode, after scoring a few pairs of all lengths to compile it."""
    jax.clear_caches()
    start = time.perf_counter()
    by_length = sorted(questions, key=lambda question: len(question.items[0].completion))
    few = [by_length[i * (len(by_length) - 1) // 15] for i in range(16)]
    scorer([item for question in few for item in question.items], scoring, quiet=True)
    compiled, cpu = time.perf_counter(), time.process_time()
    scores = scorer([item for question in questions for item in question.items], scoring)
    end = time.perf_counter()
    result = compute_metrics(questions, {"acc": np.split(scores.log_likelihood_N, len(questions))})["acc"]
    return {
        "compile_seconds": compiled - start,
        "seconds": end - compiled,
        "cpu_seconds": time.process_time() - cpu,
        "forwards": scores.forwards,
        "accuracy": result.accuracy,
        "stderr": result.stderr,
        "load": os.getloadavg()[0],
    }


def main(_: Sequence[str]) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    run = open_run(_WORKDIR.value)
    questions = load_task("blimp", _TASK_DATA.value, _PAIRS.value)
    scorer = Scorer(freeze(run.config.model), run.params, run.tokenizer, run.mesh)
    longest = run.config.seq_len
    modes = {
        "causal": ScoringParams("causal", max_length=longest),
        "masked {1}": ScoringParams("masked", masks=(1,), max_length=longest),
        "masked {1,4}": ScoringParams("masked", masks=(1, 4), max_length=longest),
    }
    if _SAMPLES.value:
        name = f"monte_carlo {_SAMPLES.value}"
        modes[name] = ScoringParams("monte_carlo", samples=_SAMPLES.value, max_length=longest)
    results = {name: measure(scorer, questions, scoring) for name, scoring in modes.items()}
    rows = [
        [
            name,
            len(questions),
            f"{r['compile_seconds']:.1f}",
            f"{r['seconds']:.1f}",
            f"{r['cpu_seconds']:.1f}",
            r["forwards"],
            f"{100 * r['accuracy']:.1f} ± {100 * r['stderr']:.1f}",
            f"{r['load']:.1f}",
        ]
        for name, r in results.items()
    ]
    say(
        table(
            [
                "mode",
                "pairs",
                "compilation, s",
                "scoring, s",
                "CPU s",
                "forward passes",
                "accuracy, %",
                "load",
            ],
            rows,
        )
    )
    if _SAMPLES.value:
        dear, cheap = results[name], results["masked {1,4}"]
        ratios = {unit: dear[unit] / cheap[unit] for unit in ("seconds", "cpu_seconds", "forwards")}
        say(
            f"{name} over masked {{1,4}}: "
            + ", ".join(f"{unit} {ratio:.1f}" for unit, ratio in ratios.items())
        )
    if _OUTPUT.value:
        content = {"workdir": str(run.workdir), "checkpoint": run.step, "pairs": len(questions)}
        Path(_OUTPUT.value).write_text(json.dumps(content | {"modes": results}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
