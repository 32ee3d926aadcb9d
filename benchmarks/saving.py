"""Measures the time that saving a checkpoint in the background costs, relative to a synchronous save.

    JAX_PLATFORMS=cpu python benchmarks/saving.py
    JAX_PLATFORMS=cpu python benchmarks/saving.py --shape=large --steps=8

Each round measures a synchronous save, a number of steps without a save, and the same number of steps after
the start of a save in the background. `blocked` is the time until the loop continues. `lost` is the total
slowdown of the steps, including any remaining writing; on a CPU, writing competes with the steps for cores.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from dualsm.config import default_config
from dualsm.devices import sharding
from dualsm.objectives import mixture
from dualsm.objectives.example import SpecialIds
from dualsm.process import cli
from dualsm.process.progress import say, table
from dualsm.rundir.checkpoint import Checkpoints
from dualsm.training.program import compile_train_step
from dualsm.training.step import Batch

SHAPES = {
    # num_layers, d_model, num_heads, d_ff, vocab_size; with AdamW, the train states have 84 and 792 MB
    "small": (6, 256, 4, 704, 4096),
    "large": (10, 512, 8, 1408, 32768),
}

_SHAPE = flags.DEFINE_enum("shape", "small", list(SHAPES), "model size")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 15, "number of rounds; results are medians over the rounds", lower_bound=1
)
_STEPS = flags.DEFINE_integer("steps", 10, "steps after a save; they must take longer than writing it")
_WORKDIR = cli.DEFINE_path("workdir", "", "folder to write to; default: a temporary folder")
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")


def saved_config(shape: str) -> ConfigDict:
    """Returns the default config with the given model size, AdamW and a small batch."""
    config = default_config()
    model = config.model
    model.num_layers, model.d_model, model.num_heads, model.d_ff, model.vocab_size = SHAPES[shape]
    config.optimizer.name = "adamw"
    config.batch_size, config.seq_len = 2, 128
    return config


class Run:
    """Times steps and saves of one train state."""

    def __init__(self, config: ConfigDict, workdir: str):
        self.mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        self.checkpoints = Checkpoints(workdir, config.checkpoint)
        shape = (config.batch_size, config.seq_len + 1)
        tokens_BxL1 = np.random.default_rng(0).integers(16, config.model.vocab_size, shape).astype(np.int32)
        rows = mixture.assign(np.array([config.batch_size]))
        with jax.set_mesh(self.mesh):
            self.program = compile_train_step(
                config, SpecialIds(vocab_size=config.model.vocab_size), self.mesh
            )
            self.batch = jax.device_put(Batch(tokens_BxL1, np.zeros_like(tokens_BxL1), *rows))
            self.state = self.program.init()
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        self.saves = 0

    def steps(self, count: int) -> float:
        """Runs `count` steps; returns the seconds they took."""
        start = time.perf_counter()
        with jax.set_mesh(self.mesh):
            for _ in range(count):
                self.state, _ = self.program.step(self.state, self.batch)
            jax.block_until_ready(self.state)
        return time.perf_counter() - start

    def save(self) -> float:
        """Starts a save; returns the seconds until the loop can continue."""
        self.saves += 1
        start = time.perf_counter()
        self.checkpoints.save(self.saves, self.state)
        return time.perf_counter() - start

    def finish(self) -> float:
        """Waits until the save is complete; returns the seconds."""
        start = time.perf_counter()
        self.checkpoints.finish()
        return time.perf_counter() - start


def one_round(run: Run, steps: int) -> dict[str, float]:
    """Returns the seconds of a synchronous save, and of steps without and with a save in the background."""
    synchronous = run.save() + run.finish()
    alone = run.steps(steps)
    still = run.save()
    after = run.steps(steps)
    rest = run.finish()
    return {
        "synchronous": synchronous,
        "steps": alone,
        "still": still,
        "rest": rest,
        "lost": still + after + rest - alone,
    }


def main(_: Sequence[str]) -> None:
    cli.set_up_jax()
    with tempfile.TemporaryDirectory(dir=_WORKDIR.value or None) as workdir:
        run = Run(saved_config(_SHAPE.value), workdir)
        one_round(run, 2)
        rounds = [one_round(run, _STEPS.value) for _ in range(_ROUNDS.value)]
        run.checkpoints.close()
    seconds = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    ratios = {
        name: statistics.median(r[name] / r["synchronous"] for r in rounds) for name in ("still", "lost")
    }
    rows = [
        ["synchronous save", f"{seconds['synchronous']:.3f}", "1.00"],
        ["background save: blocked", f"{seconds['still']:.3f}", f"{ratios['still']:.2f}"],
        ["background save: lost in total", f"{seconds['lost']:.3f}", f"{ratios['lost']:.2f}"],
    ]
    say(f"state of {run.bytes / 1e6:.0f} MB; {_STEPS.value} steps take {seconds['steps']:.2f} s")
    say(table(["", "seconds", "over synchronous save"], rows))
    say(f"load {os.getloadavg()[0]:.1f}")
    if _OUTPUT.value:
        content = {"bytes": run.bytes, "steps": _STEPS.value, "seconds": seconds, "ratios": ratios}
        Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
