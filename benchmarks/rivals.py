"""Measures what the optional parts of a training step cost, relative to the step without them.

    python benchmarks/rivals.py --shape=micro

Each round times all steps in turn, in one process; the median of the ratios over the rounds is printed.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from steps import Steps, repeated
from train_step import benchmark_config

from dualsm.devices import sharding
from dualsm.process import cli
from dualsm.process.memory import keep_freed_memory
from dualsm.process.progress import say, table
from dualsm.training.cpu_devices import cpu_devices

RIVALS = {
    "dropout": {"model.dropout": 0.1},
    "weight decay schedule": {"optimizer.weight_decay_schedule.name": "linear"},
    "exempt parameters": {"optimizer.weight_decay_exempt": "embeddings,vectors"},
    "moving average": {"ema.decay": 0.999},
    "moving average, every 10": {"ema.decay": 0.99, "ema.every": 10},
    "pair mir": {"mixture.causal": 0.0, "mixture.mir": 1.0},
}

FLAGS = flags.FLAGS  # of benchmarks/train_step.py


def rival_config(changes: dict):
    """Returns the benchmark's causal config with some keys changed."""
    config = benchmark_config(FLAGS.shape, {"causal": 1.0})
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def main(_: Sequence[str]) -> None:
    plain = rival_config({})
    if devices := cpu_devices(plain):
        jax.config.update("jax_num_cpu_devices", devices)
    keep_freed_memory(one_arena=jax.config.jax_num_cpu_devices <= 1)
    mesh = sharding.make_mesh(plain.mesh, jax.devices())
    timers = {}
    for name, changes in {"causal": {}, "causal again": {}, **RIVALS}.items():
        config = rival_config(changes)
        config.gradient_accumulation_steps = sharding.accumulation_steps(config, mesh)
        timers[name] = repeated(Steps(config, mesh), FLAGS.seconds)
    ratios = {name: [] for name in timers}
    for _ in range(FLAGS.rounds):
        seconds = {name: measure() for name, measure in timers.items()}
        for name, value in seconds.items():
            ratios[name].append(value / seconds["causal"])
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    say(f"shape {FLAGS.shape}, {mesh.size} device(s); load {os.getloadavg()[0]:.1f}")
    say(table(["step", "time over causal"], [[name, f"{ratio:.3f}"] for name, ratio in medians.items()]))
    if FLAGS.output:
        Path(FLAGS.output).write_text(json.dumps(medians, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
