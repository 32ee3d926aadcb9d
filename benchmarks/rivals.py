"""Measures the cost of optional parts of the train step, relative to the step without them.

    python benchmarks/rivals.py --shape=micro

Each round times all steps in turn, in one process; the ratio of the shortest times over all rounds is
printed. CPU time is that of all threads of the process; on a CPU that runs other work too, it varies less
than wall-clock time. The row "causal again" shows the noise.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from steps import Steps
from train_step import benchmark_config

from dualsm.devices import sharding
from dualsm.process import cli
from dualsm.process.memory import keep_freed_memory
from dualsm.process.progress import say, table
from dualsm.training.cpu_devices import cpu_devices

RIVALS = {
    "dropout": {"model.dropout": 0.1},
    "weight decay schedule": {"optimizer.weight_decay_schedule.name": "linear"},
    "weight decay exempt": {"optimizer.weight_decay_exempt": "embeddings,vectors"},
    "AdamW's learning rate": {"optimizer.adamw_learning_rate": 0.003},
    "moving average": {"ema.decay": 0.999},
    "pair mir": {"mixture.causal": 0.0, "mixture.mir": 1.0},
}

_RIVALS = flags.DEFINE_multi_enum("rivals", list(RIVALS), list(RIVALS), "part to measure; can be repeated")
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
    steps = {}
    changes = {"causal": {}, "causal again": {}} | {name: RIVALS[name] for name in _RIVALS.value}
    for name, change in changes.items():
        config = rival_config(change)
        config.gradient_accumulation_steps = sharding.accumulation_steps(config, mesh)
        steps[name] = Steps(config, mesh)
        steps[name]()
    start = time.perf_counter()
    steps["causal"]()
    count = max(1, round(FLAGS.seconds / (time.perf_counter() - start)))
    shortest = dict.fromkeys(steps, (math.inf, math.inf))
    for _ in range(FLAGS.rounds):
        for name, step in steps.items():
            shortest[name] = tuple(map(min, shortest[name], timing(step, count)))
    ratios = {
        name: [seconds / causal for seconds, causal in zip(times, shortest["causal"], strict=True)]
        for name, times in shortest.items()
    }
    say(f"shape {FLAGS.shape}, {mesh.size} device(s); load {os.getloadavg()[0]:.1f}")
    rows = [[name, f"{wall:.3f}", f"{cpu:.3f}"] for name, (wall, cpu) in ratios.items()]
    say(table(["step", "time over causal", "CPU time over causal"], rows))
    if FLAGS.output:
        Path(FLAGS.output).write_text(json.dumps(ratios, indent=1) + "\n")


def timing(step: Steps, count: int) -> tuple[float, float]:
    """Returns the wall-clock and CPU seconds of `count` steps."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    cli.run(main)
