"""Measures the train step, relative to PyTorch and to the matrix multiplication rate of the machine.

    python benchmarks/train_step.py --shape=micro
    python benchmarks/train_step.py --shape=reference
    JAX_NUM_CPU_DEVICES=1 python benchmarks/train_step.py --shape=micro

Each round times all implementations in turn, in one process. Ratios compare timings of the same round; the
median over rounds is printed. PyTorch (extra `bench`) is skipped if it is not installed. Both implementations
use AdamW. The PyTorch step is causal, with one document per sequence. The batch is sharded over the devices
as in training; small models use one device per CPU core (dualsm/training/cpu_devices.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # otherwise PyTorch's threads spin while JAX is timed
os.environ.setdefault("KMP_BLOCKTIME", "0")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from steps import MIXTURES, Steps, random_tokens, repeated  # noqa: E402

from dualsm.config import default_config  # noqa: E402
from dualsm.devices import sharding  # noqa: E402
from dualsm.devices.chips import measured_flops  # noqa: E402
from dualsm.model.flops import train_flops  # noqa: E402
from dualsm.process import cli  # noqa: E402
from dualsm.process.memory import keep_freed_memory  # noqa: E402
from dualsm.process.progress import say, table  # noqa: E402
from dualsm.training.cpu_devices import cpu_devices  # noqa: E402

SHAPES = {
    # num_layers, d_model, num_heads, d_ff, seq_len, vocab_size, batch_size
    "micro": (3, 64, 2, 192, 128, 512, 64),
    "tiny": (4, 128, 2, 384, 256, 2048, 16),  # as configs/tiny.py
    "reference": (6, 384, 6, 1024, 256, 8192, 8),
}

_SHAPE = flags.DEFINE_enum("shape", "micro", list(SHAPES), "size of the model and the batch")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 11, "number of rounds; results are medians over the rounds", lower_bound=1
)
_SECONDS = flags.DEFINE_float("seconds", 1.0, "seconds per implementation and round")
_KEEP = flags.DEFINE_bool(
    "keep_memory", True, "keep freed memory, as commands do; false uses the defaults of the C library"
)
_TORCH = flags.DEFINE_bool("torch", True, "also measure PyTorch")
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")


def benchmark_config(shape: str, shares: dict[str, float]) -> ConfigDict:
    """Returns the default config with the given shape, AdamW and mixture."""
    config = default_config()
    model = config.model
    model.num_layers, model.d_model, model.num_heads, model.d_ff, config.seq_len = SHAPES[shape][:5]
    model.vocab_size, config.batch_size = SHAPES[shape][5:]
    config.mixture = ConfigDict(dict.fromkeys(config.mixture, 0.0) | shares)
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 1e-3
    return config


def main(_: Sequence[str]) -> None:
    configs = {name: benchmark_config(_SHAPE.value, shares) for name, shares in MIXTURES.items()}
    causal = configs["causal"]
    if devices := cpu_devices(causal):
        jax.config.update("jax_num_cpu_devices", devices)
    if _KEEP.value:
        keep_freed_memory(one_arena=jax.config.jax_num_cpu_devices <= 1)
    mesh = sharding.make_mesh(causal.mesh, jax.devices())
    for config in configs.values():
        config.gradient_accumulation_steps = sharding.accumulation_steps(config, mesh)
    timers = {name: repeated(Steps(config, mesh), _SECONDS.value) for name, config in configs.items()}
    if _TORCH.value and importlib.util.find_spec("torch"):
        import torch
        from torch_peer import make_step

        torch_tokens = torch.from_numpy(random_tokens(causal).astype(np.int64))
        for name, compiled in (("PyTorch", False), ("PyTorch, compiled", True)):
            step = make_step(causal, compiled)
            timers[name] = repeated(lambda step=step: step(torch_tokens), _SECONDS.value)
    rounds, peaks = {name: [] for name in timers}, []
    for _ in range(_ROUNDS.value):
        peaks.append(measured_flops(jax.devices()[0]))
        for name, measure in timers.items():
            rounds[name].append(measure())

    flops = causal.batch_size * train_flops(causal.model, causal.seq_len, 0.5)
    tokens = causal.batch_size * causal.seq_len
    results = {
        name: {
            "milliseconds": 1e3 * statistics.median(seconds),
            "tokens_per_second": tokens / statistics.median(seconds),
            "of_matmul_rate": statistics.median(
                flops / s / peak for s, peak in zip(seconds, peaks, strict=True)
            ),
            "time_over_causal": statistics.median(
                s / ours for s, ours in zip(seconds, rounds["causal"], strict=True)
            ),
        }
        for name, seconds in rounds.items()
    }
    rows = [
        [
            name,
            f"{r['milliseconds']:.1f}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['of_matmul_rate']:.2f}",
            f"{r['time_over_causal']:.2f}",
        ]
        for name, r in results.items()
    ]
    say(f"shape {_SHAPE.value}: {SHAPES[_SHAPE.value]}, {flops / 1e9:.1f} GFLOP per causal step")
    say(f"{mesh.size} device(s), {causal.gradient_accumulation_steps} gradient accumulation step(s)")
    say(f"matrix multiplication: {statistics.median(peaks) / 1e9:.0f} GFLOP/s; load {os.getloadavg()[0]:.1f}")
    say(table(["step", "ms", "tokens/s", "of matmul rate", "time over dualsm causal"], rows))
    if _OUTPUT.value:
        content = {"shape": _SHAPE.value, "flops": flops, "matmul_flops": statistics.median(peaks)}
        Path(_OUTPUT.value).write_text(json.dumps(content | {"steps": results}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
