"""Checks that greedy speculative decoding gives the texts of greedy causal decoding, for every draft size.

    python benchmarks/greedy_equality.py --workdir=runs/tiny

In float32, texts may differ only where two tokens have nearly equal logits: for each text that differs, the
difference of the causal logits of the two tokens is printed. Exit status 1 if one exceeds 1e-4.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from absl import flags

from dualsm.config import freeze
from dualsm.evaluation.held_out_prompts import held_out_prompts
from dualsm.generation.generate import generate
from dualsm.generation.sampling_params import SamplingParams
from dualsm.generation.speculative import SpeculationParams
from dualsm.model.transformer import bind
from dualsm.process import cli
from dualsm.process.output import write_output
from dualsm.process.progress import say, table
from dualsm.rundir.trained_run import TrainedRun, open_run

_WORKDIR = cli.DEFINE_path("workdir", None, "run directory")
_DATA = cli.DEFINE_path("data", "", "corpus with the held-out text; default: the run's own corpus")
_PROMPTS = flags.DEFINE_integer("prompts", 500, "held-out prompts", lower_bound=1)
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 32, "tokens per prompt", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 24, "tokens to generate per text", lower_bound=1)
_DRAFTS = flags.DEFINE_list("drafts", [str(k) for k in range(1, 17)], "tokens per draft")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8"], "batch sizes")
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")
flags.mark_flags_as_required(["workdir"])


def texts(run: TrainedRun, prompts: list[list[int]], batch_size: int, draft: int) -> list[list[int]]:
    """Returns the greedy texts; draft 0: of causal decoding."""
    result = []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        part = part + part[: batch_size - len(part)]  # so that all batches have one shape
        mode, speculation = ("speculative", SpeculationParams(draft)) if draft else ("causal", None)
        states = generate(
            run, part, mode, _TOKENS.value, SamplingParams(temperature=0), speculation=speculation
        )
        result += list(states)[-1]
    return result[: len(prompts)]


def logit_difference(run: TrainedRun, text: list[int], other: list[int]) -> float:
    """Returns the difference of the causal logits of two texts' tokens where they first differ."""
    place = next(i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b)
    tokens_1xL = jnp.asarray([text[:place]])
    end_1xL = jnp.arange(1, place + 1)[None]
    logits_V = bind(freeze(run.config.model), run.params).logits(tokens_1xL, end_1xL * 0, end_1xL)[0, -1]
    return float(abs(logits_V[text[place]] - logits_V[other[place]]))


def main(_: Sequence[str]) -> None:
    cli.set_up_jax()
    run = open_run(_WORKDIR.value)
    prompts = held_out_prompts(run, _DATA.value, _PROMPTS.value, _PROMPT_TOKENS.value)
    expected = texts(run, prompts, 8, 0)
    records = []
    for batch_size in map(int, _BATCH_SIZES.value):
        for draft in map(int, _DRAFTS.value):
            found = texts(run, prompts, batch_size, draft)
            different = [(a, b) for a, b in zip(expected, found, strict=True) if a != b]
            differences = [logit_difference(run, *pair) for pair in different]
            record = {
                "batch_size": batch_size,
                "draft": draft,
                "texts": len(prompts),
                "equal": len(prompts) - len(different),
                "largest_logit_difference": max(differences, default=0.0),
            }
            say(json.dumps(record))
            records.append(record)
    rows = [
        [batch_size, *(r["equal"] for r in records if r["batch_size"] == int(batch_size))]
        for batch_size in _BATCH_SIZES.value
    ]
    say(f"equal texts of {len(prompts)}, by tokens per draft")
    say(table(["batch size", *_DRAFTS.value], rows))
    if _OUTPUT.value:
        write_output(Path(_OUTPUT.value), json.dumps(records, indent=1) + "\n", "--output")
    if max(record["largest_logit_difference"] for record in records) > 1e-4:
        sys.exit("speculative decoding differs from causal decoding")


if __name__ == "__main__":
    cli.run(main)
