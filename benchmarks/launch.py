"""Measures the time from launching a training run to its first completed step, by stage.

    python -m dualsm.prepare --input=python-stdlib --output=runs/corpus --vocab_size=2048
    python benchmarks/launch.py --corpus=runs/corpus

Each round starts the same command twice in new run directories, first with an empty compilation cache and
then with the cache that the first start filled, and stops it after its first step. The stages are detected
from the lines that the command prints. Imports and the check of the corpus are timed separately in the same
round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dualsm.data.corpus import SPLITS, Corpus
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.progress import say, table

_CONFIG = cli.DEFINE_path("config", "configs/tiny.py", "config file, see configs/")
_CORPUS = cli.DEFINE_path("corpus", None, "corpus written by `python -m dualsm.prepare`")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "number of rounds; results are medians over the rounds", lower_bound=1
)
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")
flags.mark_flags_as_required(["corpus"])

# Consecutive stages, and the start of the first line that is printed after each.
STAGES = {
    "imports, corpus, layout": "model: ",
    "initial weights": "compiling and validating",
    "validation, compiled or loaded": "step   0/",
    "step, compiled or loaded": "step   1/",
}


def launch(workdir: Path, cache: Path) -> dict[str, float]:
    """Starts a run and stops it after its first step; returns the seconds of each stage."""
    command = [
        sys.executable, "-m", "dualsm.train", f"--config={_CONFIG.value}", f"--workdir={workdir}",
        f"--config.data.path={_CORPUS.value}", "--config.log.every=1", "--config.steps=100",
    ]  # fmt: skip
    start, stages = time.perf_counter(), {}
    errors = workdir.with_suffix(".log").open("w+")
    process = subprocess.Popen(
        command,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    with errors, process:
        waiting = iter(STAGES.items())
        stage, ending = next(waiting)
        for line in process.stdout:
            if line.startswith(ending):
                now = time.perf_counter()
                stages[stage] = now - start
                start = now
                stage, ending = next(waiting, (None, None))
                if stage is None:
                    process.kill()
                    return stages
        errors.seek(0)
        raise UserError(f"{' '.join(command)} exited before its first step: {errors.read()[-500:]}")


def separate_times() -> dict[str, float]:
    """Returns the seconds of the parts of the first stage that can be timed separately."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import dualsm.train"], check=True)
    imported = time.perf_counter()
    corpus = Corpus(_CORPUS.value, "--corpus")
    for split in SPLITS:
        corpus.verify(split)
    return {"imports": imported - start, "check of the corpus": time.perf_counter() - imported}


def main(_: Sequence[str]) -> None:
    runs = {"empty cache": [], "filled cache": []}
    for _ in range(_ROUNDS.value):
        separate = separate_times()
        with tempfile.TemporaryDirectory() as scratch:
            for name, results in runs.items():
                stages = launch(Path(scratch, name), Path(scratch, "cache"))
                results.append({"all": sum(stages.values())} | stages | separate)
    medians = {
        name: {stage: statistics.median(r[stage] for r in results) for stage in results[0]}
        for name, results in runs.items()
    }
    order = ["imports", "check of the corpus", *STAGES, "all"]
    shown = ["- imports only", "- check of the corpus only", *STAGES, "from launch to first step"]
    rows = [
        [label, *(f"{seconds[stage]:.1f}" for seconds in medians.values())]
        for label, stage in zip(shown, order, strict=True)
    ]
    say(table(["seconds", *medians], rows))
    say(f"load {os.getloadavg()[0]:.1f}")
    if _OUTPUT.value:
        content = {"config": _CONFIG.value, "rounds": _ROUNDS.value, "seconds": medians}
        Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
