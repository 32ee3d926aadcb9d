"""Checks and times attention and the train step on an accelerator.

    python benchmarks/accelerator.py --output=runs/h200.json
    python benchmarks/accelerator.py --attention=flash --remat=none --remat=matmuls --rows=256 --check=false

First, benchmarks/attention.py checks and times attention with the shape of the config; an incorrect kernel is
an error. Then the step is timed on all devices for every combination of `--attention`, `--remat` and
`--mixture`. Each round times all combinations in turn. The first losses of all combinations with the same
mixture must agree.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags
from steps import MIXTURES, Steps, repeated

from dualsm.devices import sharding
from dualsm.devices.chips import peak_flops
from dualsm.model.attention import KERNELS
from dualsm.model.flops import train_flops
from dualsm.model.head_shapes import head_dim
from dualsm.objectives.example import SpecialIds
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.progress import say, table
from dualsm.training.program import attended_share

_CONFIG = config_flags.DEFINE_config_file("config", "configs/dual_470m.py", "config file, see configs/")
_ROWS = flags.DEFINE_integer(
    "rows", 64, "sequences per step and device; overrides the batch size of the config", lower_bound=1
)
_ATTENTION = flags.DEFINE_multi_string(
    "attention", [], "attention backends; default: xla and the kernel of the platform"
)
_REMAT = flags.DEFINE_multi_string("remat", [], "remat policies; default: the one in the config")
_MIXTURE = flags.DEFINE_multi_enum("mixture", list(MIXTURES), list(MIXTURES), "mixtures of objectives")
_CHECK = flags.DEFINE_bool("check", True, "check and time attention first")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "number of rounds; results are medians over the rounds", lower_bound=1
)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "seconds per combination and round")
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")


def check_attention(config: ConfigDict) -> None:
    """Checks and times attention in a separate process, which frees all device memory."""
    model = config.model
    script = [sys.executable, str(Path(__file__).with_name("attention.py")), f"--rounds={_ROUNDS.value}"]
    shape = [
        f"--length={config.seq_len}",
        f"--heads={model.num_heads}",
        f"--width={head_dim(model)}",
    ]
    if subprocess.run([*script, *shape, f"--dtype={model.dtype}", "--queries=128"], check=False).returncode:
        raise UserError(
            "the attention check failed, see the output above; use --check=false to time the step anyway"
        )


def timed_config(recipe: ConfigDict, attention: str, remat: str, mixture: str) -> ConfigDict:
    """Returns the config with the given attention, remat policy, mixture, and the batch size of --rows."""
    config = recipe.copy_and_resolve_references()
    config.batch_size = _ROWS.value * len(jax.devices())
    config.model.attention, config.model.remat = attention, remat
    config.mixture = ConfigDict(dict.fromkeys(config.mixture, 0.0) | MIXTURES[mixture])
    return config


def measured(recipe: ConfigDict) -> dict[str, dict]:
    """Times all combinations; returns the results by "attention, remat, mixture"."""
    mesh = sharding.make_mesh(recipe.mesh, jax.devices())
    backends = _ATTENTION.value or ["xla", *filter(None, [KERNELS.get(jax.default_backend())])]
    results, timers = {}, {}
    for case in itertools.product(backends, _REMAT.value or [recipe.model.remat], _MIXTURE.value):
        config = timed_config(recipe, *case)
        config.gradient_accumulation_steps = sharding.accumulation_steps(config, mesh)
        share = attended_share(config, SpecialIds(vocab_size=config.model.vocab_size))
        flops = config.batch_size * train_flops(config.model, config.seq_len, share)
        step = Steps(config, mesh)
        step()
        first_loss = float(step.metrics.nll_J.sum() / step.metrics.loss_denominator_J.sum())
        memory = step.memory.argument_size_in_bytes + step.memory.temp_size_in_bytes
        name = ", ".join(case)
        timers[name] = repeated(step, _SECONDS.value)
        results[name] = {
            "mixture": case[-1],
            "first_loss": first_loss,
            "flops": flops,
            "tokens": config.batch_size * config.seq_len,
            "gib": memory / 2**30,
        }
    seconds = {name: [] for name in timers}
    for _ in range(_ROUNDS.value):
        for name, measure in timers.items():
            seconds[name].append(measure())
    peak = peak_flops(jax.devices()[0]) * len(jax.devices())
    for name, result in results.items():
        causal = seconds.get(f"{name.rpartition(', ')[0]}, causal", seconds[name])
        result["seconds"] = statistics.median(seconds[name])
        result["mfu"] = result["flops"] / result["seconds"] / peak
        result["time_over_causal"] = statistics.median(
            s / c for s, c in zip(seconds[name], causal, strict=True)
        )
    return results


def main(_: Sequence[str]) -> None:
    recipe = cli.config(_CONFIG)
    if not recipe.model.vocab_size:
        raise UserError(
            "config.model.vocab_size is 0; set --config.model.vocab_size, because no corpus is read"
        )
    if _CHECK.value:
        check_attention(recipe)
    results = measured(recipe)
    devices = jax.devices()
    kind, length = devices[0].device_kind, recipe.seq_len
    say(f"\n{len(devices)} x {kind}, {_ROWS.value} sequences of {length} tokens per device")
    columns = ["seconds", "tokens/s", "MFU", "time over causal", "GiB", "first loss"]
    say(
        table(
            ["attention, remat, mixture", *columns],
            [
                [
                    name,
                    f"{r['seconds']:.3f}",
                    f"{r['tokens'] / r['seconds']:,.0f}",
                    f"{r['mfu']:.1%}",
                    f"{r['time_over_causal']:.2f}",
                    f"{r['gib']:.1f}",
                    f"{r['first_loss']:.4f}",
                ]
                for name, r in results.items()
            ],
        )
    )
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n")
    for mixture in _MIXTURE.value:
        losses = [r["first_loss"] for r in results.values() if r["mixture"] == mixture]
        if not max(losses) - min(losses) < 0.01 * min(losses):
            raise UserError(f"the first losses of the mixture {mixture!r} differ by more than 1%: {losses}")


if __name__ == "__main__":
    cli.run(main)
