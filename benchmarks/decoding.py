"""Measures the time per generated token early and late in a text, with and without the key-value cache.

    python benchmarks/decoding.py --workdir=runs/tiny

With the cache, the time per token is constant; without it, the time grows with the number of earlier tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dualsm.config import freeze
from dualsm.generation.autoregressive import DecodeState, decode, prefill
from dualsm.generation.prompt_batches import prompt_keys
from dualsm.generation.sampling_params import SamplingParams
from dualsm.model.transformer import bind
from dualsm.process import cli
from dualsm.process.progress import say, table
from dualsm.rundir.trained_run import TrainedRun, open_run

_WORKDIR = cli.DEFINE_path("workdir", None, "run directory")
_POSITIONS = flags.DEFINE_list("positions", ["20", "200"], "positions in the text to measure at")
_REPEATS = flags.DEFINE_integer("repeats", 60, "measurements per position; results are medians")
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")
flags.mark_flags_as_required(["workdir"])

_TOKENS = 8  # decoded per measurement, around the position


def cached(run: TrainedRun, positions: Sequence[int]) -> list[Callable[[], float]]:
    """Returns a function per position that decodes `_TOKENS` tokens and returns seconds per token."""
    special = dataclasses.replace(run.tokenizer.special, eos=-1)  # never stop at `</s>`
    config, length = freeze(run.config.model), np.ones(1, np.int32)
    prompt = np.array([[special.bos]], np.int32)
    more = functools.partial(
        decode, config, run.params, sampling=SamplingParams(temperature=0), special=special
    )

    def at(position: int) -> Callable[[], float]:
        state: DecodeState = prefill(
            config, run.params, prompt, length, prompt_keys(0, prompt),
            size=max(positions) + _TOKENS, bidirectional=False, special=special,
        )  # fmt: skip
        while int(state.length_B[0]) < position - _TOKENS // 2:
            state = more(state, steps=1)
        state = jax.device_get(state._replace(key_B=jax.random.key_data(state.key_B)))

        def measured() -> float:
            fresh = jax.tree.map(jnp.asarray, state)
            fresh = jax.block_until_ready(fresh._replace(key_B=jax.random.wrap_key_data(fresh.key_B)))
            start = time.perf_counter()
            jax.block_until_ready(more(fresh, steps=_TOKENS))
            return (time.perf_counter() - start) / _TOKENS

        return measured

    return [at(position) for position in positions]


def uncached(run: TrainedRun, positions: Sequence[int]) -> list[Callable[[], float]]:
    """Returns a function per position that runs the model on all earlier tokens and returns the seconds."""
    config = freeze(run.config.model)

    @jax.jit
    def last_logits(params, tokens_BxL):
        ends_BxL = jnp.arange(1, tokens_BxL.shape[1] + 1)[None]
        features_BxLxD = bind(config, params).features(tokens_BxL, jnp.zeros_like(tokens_BxL), ends_BxL)
        return bind(config, params).head.output(features_BxLxD[:, -1])

    def at(position: int) -> Callable[[], float]:
        tokens_BxL = jnp.full((1, position), run.tokenizer.special.bos, jnp.int32)

        def measured() -> float:
            start = time.perf_counter()
            jax.block_until_ready(last_logits(run.params, tokens_BxL))
            return time.perf_counter() - start

        return measured

    return [at(position) for position in positions]


def medians(functions: Sequence[Callable[[], float]]) -> list[float]:
    """Returns the median seconds of each function, measured in turn so that other load affects all alike."""
    for function in functions:
        function()  # compiles
    seconds = [[function() for function in functions] for _ in range(_REPEATS.value)]
    return np.median(seconds, axis=0).tolist()


def main(_: Sequence[str]) -> None:
    run = open_run(_WORKDIR.value)
    positions = [int(position) for position in _POSITIONS.value]
    both = {"with cache": cached, "without cache": uncached}
    results = {name: medians(make(run, positions)) for name, make in both.items()}
    rows = [
        [name, *(f"{1000 * s:.2f}" for s in seconds), f"{seconds[-1] / seconds[0]:.2f}"]
        for name, seconds in results.items()
    ]
    header = ["ms per token at position", *map(str, positions), f"{positions[-1]} over {positions[0]}"]
    say(table(header, rows))
    say(f"load {os.getloadavg()[0]:.1f}")
    if _OUTPUT.value:
        content = {"workdir": str(run.workdir), "positions": positions, "seconds": results}
        Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
