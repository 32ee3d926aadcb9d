"""SIGKILL at random moments of a run loses nothing; benchmarks/kills.py repeats this hundreds of times."""

import dataclasses
import itertools
import json
import os
import random
import time
from pathlib import Path

import pytest

from tests.killing import Kill, Killing, problems

pytestmark = pytest.mark.slow

SECONDS = 20  # time limit of the kills
MOST = 10


@pytest.fixture(scope="module")
def killing(corpus_path) -> Killing:
    return Killing(corpus_path, Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))


@pytest.fixture(scope="module")
def reference(killing, tmp_path_factory):
    """Returns an uninterrupted run, and its duration in seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    killing.finish(folder / "compiling")
    return folder / "run", killing.finish(folder / "run")


def test_killed_runs_equal_an_uninterrupted_run(killing, reference, tmp_path):
    rng, start, killed = random.Random(0), time.monotonic(), 0
    for run in itertools.count():
        workdir = tmp_path / f"run{run}"
        kills = killing.kill_until_done(workdir, rng, reference[1], most=4)
        assert not problems(kills, workdir, reference[0])
        killed += len(kills)
        if killed >= MOST or (killed and time.monotonic() - start > SECONDS):
            break


def test_comparison_detects_differences(reference, tmp_path):
    """It detects changed numbers, missing steps and lost checkpoints."""
    run = reference[0]
    good = Kill("training", done=10, whole=8, half=False, resumed=8)
    assert problems([good], run, run) == []
    assert "went on from 4" in problems([dataclasses.replace(good, resumed=4)], run, run)[0]
    assert "in no checkpoint" in problems([dataclasses.replace(good, whole=4)], run, run)[0]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "checkpoints"):
        (copy / name).symlink_to(run / name)
    (copy / "metrics.jsonl").write_text("\n".join([*lines[:-1], lines[-2], lines[-1]]) + "\n")
    assert "steps" in problems([], copy, run)[0]
    changed = json.loads(lines[-1])
    changed["train/loss"] += 1e-7
    (copy / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(changed)]) + "\n")
    assert problems([], copy, run) == ["other numbers in metrics.jsonl"]
