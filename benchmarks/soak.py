"""Trains a tiny model for many steps and checks its process for growing resource use.

    JAX_PLATFORMS=cpu python -m benchmarks.soak --steps=20000 --output=soak.json

Reports the slope of memory, open files, threads and step time after a warm-up, with its standard error. The
slope is fitted to the medians of 20 intervals, because neighboring samples are correlated and a save briefly
uses threads and files. Memory is anonymous resident memory: the system loads and evicts pages of libraries at
any time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.progress import bar, say, table
from tests.fuzzing.artifacts import real_texts
from tests.fuzzing.corpora import make_corpus

_STEPS = flags.DEFINE_integer("steps", 20_000, "number of steps", lower_bound=200)
_EVERY = flags.DEFINE_float("every", 0.5, "seconds between samples", lower_bound=0.01)
_WARM_UP = flags.DEFINE_float(
    "warm_up", 0.4, "fraction of steps to exclude; memory use settles late", lower_bound=0, upper_bound=0.9
)
_OUTPUT = cli.DEFINE_path("output", "", "write the results and all samples to this JSON file")

INTERVALS = 20
QUANTILE = 2.101  # of Student's t, 18 degrees of freedom, two-sided 95 percent
RECIPE = """
from tests.micro import micro_config

def get_config():
    config = micro_config({corpus!r})
    config.steps, config.repetitions = {steps}, {steps} * 256 // 4096 + 1
    config.log.tensorboard = True
    config.log.every, config.checkpoint.every, config.valid.every = 10, 500, 1000
    return config
"""


def main(_: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        samples = watch(Path(scratch), _STEPS.value, _EVERY.value)
    warm = [sample for sample in samples if sample["step"] > _WARM_UP.value * _STEPS.value]
    results = {name: slope(warm, name) for name in ("memory_mb", "open_files", "threads", "step_ms")}
    say(
        f"{_STEPS.value} steps, {len(warm)} samples after the first {_WARM_UP.value:.0%}; "
        "slopes are per 10,000 steps"
    )
    rows = [
        [
            name,
            f"{r['first']:.2f}",
            f"{r['last']:.2f}",
            f"{r['min']:.2f} to {r['max']:.2f}",
            f"{r['slope']:+.3f} ± {r['stderr']:.3f}",
            "no" if r["flat"] else "yes",
        ]
        for name, r in results.items()
    ]
    say(table(["", "first", "last", "range", "slope", "differs from 0"], rows))
    if _OUTPUT.value:
        content = {"steps": _STEPS.value, "slopes_per_10000_steps": results, "samples": samples}
        Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")


def watch(scratch: Path, steps: int, every: float) -> list[dict[str, float]]:
    """Runs the training and samples its resource use, starting at the first log line."""
    recipe, workdir, log = scratch / "recipe.py", scratch / "run", scratch / "log"
    corpus = make_corpus(scratch, real_texts("json/*.py"))
    recipe.write_text(RECIPE.format(corpus=str(corpus), steps=steps))
    command = [sys.executable, "-m", "dualsm.train", f"--config={recipe}", f"--workdir={workdir}"]
    samples: list[dict[str, float]] = []
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with log.open("w") as output, bar(total=steps, unit="step") as progress:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        lines, read = Lines(workdir / "metrics.jsonl"), time.perf_counter()
        while process.poll() is None:
            time.sleep(every)
            before, step, now = lines.step, lines.newest(), time.perf_counter()
            usage = look(process.pid)
            if usage and 0 < before < step:
                samples.append({"step": step, "step_ms": 1000 * (now - read) / (step - before)} | usage)
            if step > before:
                read = now
                progress.update(step - progress.n)
    if process.returncode:
        raise UserError(f"training exited with status {process.returncode}: {log.read_text()[-500:]}")
    return samples


class Lines:
    """Follows a growing `metrics.jsonl` and returns its latest step."""

    def __init__(self, path: Path):
        self._path, self._read, self.step = path, 0, 0

    def newest(self) -> int:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._read += len(whole) + 1
                self.step = json.loads(whole.rpartition(b"\n")[2])["step"]
        return self.step


def look(pid: int) -> dict[str, float]:
    """Returns memory, open files and threads of a process; empty if it has exited."""
    process = Path("/proc") / str(pid)
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        files, memory = len(os.listdir(process / "fd")), int(status["RssAnon"].split()[0])
    except (OSError, KeyError):
        return {}
    return {"memory_mb": memory / 1024, "open_files": files, "threads": int(status["Threads"])}


def slope(samples: list[dict[str, float]], name: str) -> dict[str, float | bool]:
    """Fits a line to the medians of equal intervals of the samples; returns its slope per 10,000 steps."""
    intervals = np.array_split(np.array([(s["step"] / 1e4, s[name]) for s in samples]), INTERVALS)
    x_S, y_S = np.array([np.median(interval, axis=0) for interval in intervals]).T
    deviation_S = x_S - x_S.mean()
    found = deviation_S @ y_S / (deviation_S @ deviation_S)
    rest_S = y_S - y_S.mean() - found * deviation_S
    stderr = np.sqrt(rest_S @ rest_S / (INTERVALS - 2) / (deviation_S @ deviation_S))
    values = [s[name] for s in samples]
    return {
        "first": float(y_S[0]),
        "last": float(y_S[-1]),
        "min": min(values),
        "max": max(values),
        "slope": float(found),
        "stderr": float(stderr),
        "flat": bool(abs(found) <= QUANTILE * stderr + 1e-9),
    }


if __name__ == "__main__":
    cli.run(main)
