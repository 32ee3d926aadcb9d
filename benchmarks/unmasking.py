"""Measures unmasking with and without a cache, beside causal and speculative decoding.

    python benchmarks/unmasking.py --workdir=runs/tiny --blocks=32

All modes continue the same segments of held-out documents. The quality of a mode is the causal model's nll of
the texts that it generates: lossless modes have that of causal decoding, up to sampling noise. The held-out
NELBO with blocks is printed beside that with attention to whole documents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from dualsm.config import freeze
from dualsm.evaluation.block_nelbo import describe_block_nelbo
from dualsm.evaluation.held_out_prompts import held_out_prompts
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Scorer
from dualsm.generation.cached_diffusion import ForwardCounts
from dualsm.generation.diffusion import UnmaskingParams
from dualsm.generation.draft_counts import DraftCounts
from dualsm.generation.generate import Throughput, generate, why_cache_is_approximate
from dualsm.generation.prompt_batches import prompt_keys
from dualsm.generation.sampling_params import SamplingParams
from dualsm.process import cli
from dualsm.process.progress import say, table
from dualsm.rundir.trained_run import TrainedRun, open_run

_WORKDIR = cli.DEFINE_path("workdir", None, "run directory")
_DATA = cli.DEFINE_path("data", "", "corpus with the held-out text; default: the run's own corpus")
_BLOCKS = flags.DEFINE_list("blocks", ["32"], "tokens per block")
_THRESHOLDS = flags.DEFINE_list(
    "thresholds", ["0", "0.5", "0.9"], "thresholds of unmasking; 0: one token per pass"
)
_TEXTS = flags.DEFINE_integer("texts", 32, "texts per mode")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 32, "tokens per prompt")
_TOKENS = flags.DEFINE_integer("tokens", 128, "tokens to generate per text")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "sampling temperature")
_RUNS = flags.DEFINE_integer("runs", 3, "runs per mode; speeds are medians")
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")
flags.mark_flags_as_required(["workdir"])


class Setting(NamedTuple):
    """A way to generate texts."""

    mode: str
    block: int = 0
    threshold: float = 0.0
    cache: bool = False


def settings() -> list[Setting]:
    found = [Setting("causal"), Setting("speculative")]
    for threshold in map(float, _THRESHOLDS.value):
        found.append(Setting("diffusion", 0, threshold))
        for block in map(int, _BLOCKS.value):
            found += [Setting("diffusion", block, threshold, cache) for cache in (False, True)]
    return found


def measure(
    run: TrainedRun, prompts: list[list[int]], setting: Setting
) -> tuple[Throughput, list[list[int]]]:
    """Generates a text from each prompt; returns the throughput and the new tokens."""
    counts = DraftCounts() if setting.mode == "speculative" else ForwardCounts() if setting.cache else None
    throughput = Throughput(setting.mode, run.tokenizer.special.mask, counts)
    unmasking = UnmaskingParams(threshold=setting.threshold, block=setting.block)
    for texts in generate(
        run, prompts, setting.mode, _TOKENS.value, SamplingParams(_TEMPERATURE.value), unmasking,
        prompt_keys(0, prompts), counts=counts, cache=setting.cache,
    ):  # fmt: skip
        throughput.update(texts)
    return throughput, [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def causal_nll(run: TrainedRun, prompts: list[list[int]], new: list[list[int]]) -> tuple[float, float]:
    """Returns the causal model's nll of new tokens, in nats per token, and its standard error over texts."""
    scorer = Scorer(freeze(run.config.model), run.params, run.tokenizer, run.mesh)
    bos = run.tokenizer.special.bos  # the scorer adds it
    contexts = [prompt[1:] if prompt[0] == bos else prompt for prompt in prompts]
    length = max(map(len, prompts)) + _TOKENS.value + 1
    scores = scorer.score_tokens(
        list(zip(contexts, new, strict=True)), ScoringParams("causal", max_length=length), quiet=True
    )
    tokens_N = np.array(list(map(len, new)))
    mean = -scores.log_likelihood_N.sum() / tokens_N.sum()
    residual_N = -scores.log_likelihood_N - mean * tokens_N  # of a ratio of sums
    return float(mean), float(residual_N.std(ddof=1) * len(new) ** 0.5 / tokens_N.sum())


def measure_all(run: TrainedRun) -> list[dict]:
    prompts = held_out_prompts(run, _DATA.value, _TEXTS.value, _PROMPT_TOKENS.value)
    records, speeds = {}, {setting: [] for setting in settings()}
    for _ in range(_RUNS.value):
        for setting in settings():
            throughput, new = measure(run, prompts, setting)
            speeds[setting].append(throughput.tokens_per_second())
            if setting not in records:
                nll, stderr = causal_nll(run, prompts, new)
                tokens_per_forward = throughput.new_tokens / throughput.forwards()
                records[setting] = setting._asdict() | {
                    "tokens_per_forward": tokens_per_forward, "nll": nll, "stderr": stderr
                }  # fmt: skip
    return [
        record | {"tokens_per_second": float(np.median(speeds[setting]))}
        for setting, record in records.items()
    ]


def as_table(records: Sequence[dict]) -> str:
    rows = [
        [
            record["mode"],
            record["block"] or "",
            ("yes" if record["cache"] else "no") if record["mode"] == "diffusion" else "",
            (record["threshold"] or "one token") if record["mode"] == "diffusion" else "",
            f"{record['tokens_per_forward']:.2f}",
            f"{record['tokens_per_second']:.0f}",
            f"{record['nll']:.2f} ± {record['stderr']:.2f}",
        ]
        for record in records
    ]
    header = ["mode", "block", "cache", "threshold", "tokens per forward", "tokens per second", "causal nll"]
    return table(header, rows)


def main(_: Sequence[str]) -> None:
    cli.set_up_jax()
    run = open_run(_WORKDIR.value)
    nelbos = {block: describe_block_nelbo(run, int(block)) for block in _BLOCKS.value}
    for block, text in nelbos.items():
        say(f"{text}; the run {why_cache_is_approximate(run, int(block)) or 'was trained on such blocks'}")
    records = measure_all(run)
    say(as_table(records))
    say(f"load {os.getloadavg()[0]:.1f}")
    if _OUTPUT.value:
        content = {"workdir": str(run.workdir), "nelbo": nelbos, "modes": records}
        Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
