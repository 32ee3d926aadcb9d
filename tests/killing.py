"""Kills training at random moments until it finishes, and compares the result with an uninterrupted run.

Processes are forked from a server that has imported all modules but has not started a JAX backend, so that
training starts within one or two seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from dualsm.config import load_config, save_config
from dualsm.model.transformer import init_params
from dualsm.rundir.checkpoint import Checkpoints
from dualsm.rundir.checkpoint_folder import CHECKPOINTS
from dualsm.rundir.checkpoint_reader import restore_params
from dualsm.rundir.metrics import read_metrics
from dualsm.rundir.workdir import CONFIG
from dualsm.training.loop import train
from dualsm.training.validation import Validation
from tests.micro import micro_config

_NUM_DEVICES = "--xla_force_host_platform_device_count"
STAGES = ("starting", "training", "validating", "saving")
_STAGE, _FIRST, _DONE = range(3)  # indices in the array that a run reports to
_POLL = 0.001  # seconds


@dataclasses.dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
      stage: stage of the run, one of `STAGES`.
      done: number of started steps.
      whole: step of the newest complete checkpoint.
      half: True if another checkpoint was being written.
      resumed: step from which the next process resumed.
    """

    stage: str
    done: int
    whole: int
    half: bool
    resumed: int = -1

    @property
    def recomputed(self) -> int:
        return max(self.done - self.resumed, 0)


class Killing:
    """Runs of one config in processes that can be killed."""

    def __init__(self, corpus: Path, cache: Path):
        """
        Args:
          corpus: to train on.
          cache: folder for compiled programs.
        """
        self.config = micro_config(corpus)
        self.config.steps, self.config.log.tensorboard = 24, True
        self.config.valid.objectives = "causal"  # fewer programs to load at the start
        self._cache = str(cache)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])

    def finish(self, workdir: Path) -> tuple[float, float]:
        """Trains without interruption; returns the seconds of the run, and those from its first step on."""
        process, shared, start = *self._start(workdir), time.perf_counter()
        while process.is_alive() and not shared[_DONE]:
            time.sleep(_POLL)
        began = time.perf_counter()
        process.join()
        _check(process, workdir)
        end = time.perf_counter()
        return end - start, end - began

    def kill_until_done(
        self, workdir: Path, rng: random.Random, seconds: tuple[float, float], most: int
    ) -> list[Kill]:
        """Trains and kills repeatedly, until a run finishes before it is killed or after `most` kills.

        Args:
          workdir: new.
          rng: decides the moments: half anywhere in the run, half from its first step on.
          seconds: from `finish`.
          most: kills.
        """
        kills: list[Kill] = []
        while True:
            process, shared = self._start(workdir)
            if len(kills) < most:
                anywhere = rng.random() < 0.5
                while not anywhere and process.is_alive() and not shared[_DONE]:
                    time.sleep(_POLL)
                process.join(rng.uniform(0, seconds[0] if anywhere else seconds[1]))
            else:
                process.join()
            ended = not process.is_alive()
            if not ended:
                process.kill()
                process.join()
            if kills and shared[_FIRST] >= 0:
                # Processes that were killed before they restored a checkpoint changed nothing.
                kills = [
                    k if k.resumed >= 0 else dataclasses.replace(k, resumed=shared[_FIRST]) for k in kills
                ]
            if ended:
                _check(process, workdir)
                return kills
            kills.append(Kill(STAGES[shared[_STAGE]], shared[_DONE], *_checkpoints(workdir)))

    def _start(self, workdir: Path):
        shared = self._context.RawArray("i", 3)
        shared[_FIRST] = -1
        arguments = save_config(self.config), str(workdir), shared, self._cache
        process = self._context.Process(target=_train, args=arguments)
        process.start()
        return process, shared


def _train(config: str, workdir: str, shared, cache: str) -> None:
    """Trains in the process that is killed, and writes its progress to `shared`."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_NUM_DEVICES)]
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"{_NUM_DEVICES}=1"])
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def stop(step: int) -> bool:
        if shared[_FIRST] < 0:
            shared[_FIRST] = step - 1
        if shared[_DONE] != step:  # not during a validation
            shared[_STAGE], shared[_DONE] = STAGES.index("training"), step
        return False

    def staged(stage: str, function):
        def call(*args, **kwargs):
            before, shared[_STAGE] = shared[_STAGE], STAGES.index(stage)
            result = function(*args, **kwargs)
            shared[_STAGE] = before
            return result

        return call

    with (
        open(f"{workdir}.log", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        mock.patch.object(Checkpoints, "save", staged("saving", Checkpoints.save)),
        mock.patch.object(Validation, "__call__", staged("validating", Validation.__call__)),
    ):
        done = train(load_config(config), workdir, stop)
    if shared[_FIRST] < 0:  # the run is already complete
        shared[_FIRST] = load_config(config).steps
    sys.exit(0 if done else 1)


def _check(process, workdir: Path) -> None:
    if process.exitcode:
        raise RuntimeError(
            f"training ended with {process.exitcode}: {Path(f'{workdir}.log').read_text()[-2000:]}"
        )


def _checkpoints(workdir: Path) -> tuple[int, bool]:
    """Returns the step of the newest complete checkpoint, or 0, and True if another one is incomplete."""
    folder = workdir / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    whole = [int(name) for name in names if name.isdigit()]
    return max(whole, default=0), len(whole) < len(names)


def problems(kills: list[Kill], workdir: Path, reference: Path) -> list[str]:
    """Returns the differences of a killed run from an uninterrupted run; [] if they are equal."""
    found = []
    every = load_config((reference / CONFIG).read_text()).checkpoint.every
    for number, kill in enumerate(kills):
        if kill.resumed < kill.whole:
            found.append(
                f"kill {number}: went on from {kill.resumed}, not from the checkpoint of {kill.whole}"
            )
        if kill.done - kill.whole > every * (2 if kill.half else 1):
            found.append(f"kill {number}: {kill.done - kill.whole} steps were in no checkpoint")
    ours, expected = [[_learned(record) for record in read_metrics(w)] for w in (workdir, reference)]
    if [record["step"] for record in ours] != [record["step"] for record in expected]:
        found.append(f"steps {[record['step'] for record in ours]} in metrics.jsonl")
    elif ours != expected:
        found.append("other numbers in metrics.jsonl")
    leaves = [jax.tree.leaves(_params(w)) for w in (workdir, reference)]
    if not all(np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in zip(*leaves, strict=True)):
        found.append("other weights")
    return found


def _learned(record: dict) -> dict:
    """Returns the metrics of a log line that do not depend on time."""
    return {name: value for name, value in record.items() if not name.startswith("perf/")}


def _params(workdir: Path) -> dict:
    """Returns the parameters of the last checkpoint, on the host."""
    config = load_config((workdir / CONFIG).read_text())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    return jax.tree.map(np.asarray, restore_params(workdir, shapes, config.steps)[1])
