"""Compares the speed of causal decoding with `generate` of transformers, on the same model and prompts.

    python -m dualsm.convert export --format=huggingface --workdir=runs/tiny --output=exported
    JAX_PLATFORMS=cpu python benchmarks/generation_peer.py --workdir=runs/tiny --exported=exported

Both decode greedily with a key-value cache, in float32, and never stop at `</s>`. Seconds are those of the
whole call, prefill included and compilation excluded. Needs the extra `test-hf`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from dualsm.config import freeze
from dualsm.data.tokenizer import RESERVED_IDS
from dualsm.evaluation.held_out_prompts import held_out_prompts
from dualsm.generation.autoregressive import generate
from dualsm.generation.sampling_params import SamplingParams
from dualsm.process import cli
from dualsm.process.output import write_output
from dualsm.process.progress import say, table
from dualsm.rundir.trained_run import TrainedRun, open_run

_WORKDIR = cli.DEFINE_path("workdir", None, "run directory")
_EXPORTED = cli.DEFINE_path("exported", None, "the same run, exported for transformers")
_DATA = cli.DEFINE_path("data", "", "corpus with the held-out text; default: the run's own corpus")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "batch sizes")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 32, "tokens per prompt", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 96, "tokens to generate per text", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 5, "runs per batch size; times are medians", lower_bound=1)
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")
flags.mark_flags_as_required(["workdir", "exported"])


def ours(run: TrainedRun, prompts: list[list[int]]) -> list[list[int]]:
    """Returns the texts that dualsm generates."""
    special = dataclasses.replace(run.tokenizer.special, eos=-1)
    config, sampling = freeze(run.config.model), SamplingParams(temperature=0)
    return list(generate(config, run.params, prompts, _TOKENS.value, sampling, special))[-1]


def theirs(model, prompts_BxP: np.ndarray, suppressed: list[int]) -> list[list[int]]:
    """Returns the texts that transformers generates."""
    import torch

    tokens_BxP = torch.as_tensor(prompts_BxP, dtype=torch.long)
    return model.generate(
        tokens_BxP,
        attention_mask=torch.ones_like(tokens_BxP),
        do_sample=False,
        max_new_tokens=_TOKENS.value,
        eos_token_id=-1,
        pad_token_id=0,
        suppress_tokens=suppressed,
    ).tolist()


def measure(functions: Sequence[Callable]) -> tuple[list, list[float]]:
    """Returns the results of the functions and their median seconds, measured in turn."""
    results = [function() for function in functions]  # compiles
    seconds_RxF = []
    for _ in range(_RUNS.value):
        seconds_F = []
        for function in functions:
            start = time.perf_counter()
            function()
            seconds_F.append(time.perf_counter() - start)
        seconds_RxF.append(seconds_F)
    return results, np.median(seconds_RxF, axis=0).tolist()


def main(argv: Sequence[str]) -> None:
    del argv
    cli.set_up_jax()
    import torch
    import transformers

    run = open_run(_WORKDIR.value)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(_EXPORTED.value), dtype=torch.float32, trust_remote_code=True
    ).eval()
    external_V = run.tokenizer.external_ids_V  # ids in the exported model; -1: it has no such token
    suppressed = [i for i in external_V[:RESERVED_IDS].tolist() if i >= 0]
    records, rows = [], []
    for batch_size in map(int, _BATCH_SIZES.value):
        prompts = held_out_prompts(run, _DATA.value, batch_size, _PROMPT_TOKENS.value)
        (a, b), (seconds, peer_seconds) = measure(
            [lambda p=prompts: ours(run, p), lambda p=external_V[prompts]: theirs(model, p, suppressed)]
        )
        tokens = batch_size * _TOKENS.value
        equal = int((external_V[a] == b).all(axis=1).sum())
        record = {
            "batch_size": batch_size,
            "tokens_per_second": tokens / seconds,
            "transformers_tokens_per_second": tokens / peer_seconds,
            "ratio": peer_seconds / seconds,
            "equal_texts": equal,
        }
        records.append(record)
        rows.append([batch_size, f"{tokens / seconds:.0f}", f"{tokens / peer_seconds:.0f}"])
        rows[-1] += [f"{record['ratio']:.2f}", f"{equal} of {batch_size}"]
    parameters = sum(x.size for x in jax.tree.leaves(run.params))
    say(f"{parameters / 1e6:.1f}M parameters, {type(model).__name__}, {jax.devices()[0].device_kind}")
    say(table(["batch size", "tokens per second", "transformers", "ratio", "equal texts"], rows))
    if _OUTPUT.value:
        write_output(Path(_OUTPUT.value), json.dumps(records, indent=1) + "\n", "--output")


if __name__ == "__main__":
    cli.run(main)
