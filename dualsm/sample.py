"""Generates text with a trained run, in any of its modes.

python -m dualsm.sample --workdir=runs/tiny --mode=causal --prompt='def main('
python -m dualsm.sample --workdir=runs/tiny --mode=diffusion --prompt='def <mask:8>: return x'
python -m dualsm.sample --workdir=runs/tiny --mode=diffusion --block=32 --cache --prompt='def main('
python -m dualsm.sample --workdir=runs/tiny --mode=speculative --prompt='def main('
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

from absl import flags

from dualsm.evaluation.block_nelbo import describe_block_nelbo
from dualsm.generation.cached_diffusion import ForwardCounts
from dualsm.generation.diffusion import ORDERS, UnmaskingParams
from dualsm.generation.draft_counts import DraftCounts
from dualsm.generation.generate import (
    MODES,
    Throughput,
    causal_speed,
    generate,
    why_cache_is_approximate,
)
from dualsm.generation.prompt_batches import prompt_keys
from dualsm.generation.prompts import encode_prompt, read_prompts, show
from dualsm.generation.sampling_params import GREEDY_BELOW, SamplingParams
from dualsm.generation.speculative import MAX_DRAFT, SpeculationParams
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.output import check_output, write_output
from dualsm.process.paths import user_path
from dualsm.process.progress import LiveText, warn
from dualsm.rundir.trained_run import PARAMETERS, TrainedRun, open_run

_WORKDIR = cli.DEFINE_path("workdir", None, "run directory")
_CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "step of the checkpoint; default: the newest")
_PARAMETERS = flags.DEFINE_enum(
    "parameters", "last", list(PARAMETERS), "last: the weights; ema: their moving average (config.ema)"
)
_MODE = flags.DEFINE_enum("mode", "causal", MODES, "generation mode")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "prompt; repeat the flag to generate from several prompts")
_PROMPTS = cli.DEFINE_path(
    "prompts", "", "file with prompts: .jsonl with a field `prompt`, or text with one prompt per line"
)
_TOKENS = flags.DEFINE_integer(
    "tokens", 64, "maximum number of tokens to add to a prompt without masks", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "sampling temperature; 0 decodes greedily")
_TOP_K = flags.DEFINE_integer("top_k", 0, "number of most likely tokens to sample from; 0: all")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "minimum total probability of the tokens to sample from")
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "sampling seed; a text depends only on the seed, its prompt and the number of equal prompts before it",
    0,
    2**32 - 1,
)
_ORDER = flags.DEFINE_enum("order", "confidence", ORDERS, "diffusion: positions to unmask first")
_STEPS = flags.DEFINE_integer("steps", 0, "diffusion: unmasking passes per block; 0: one per token")
_THRESHOLD = flags.DEFINE_float(
    "threshold", 0.0, "diffusion: unmask all tokens whose probability reaches this threshold; 0: off"
)
_BLOCK = flags.DEFINE_integer(
    "block",
    0,
    "diffusion: unmask blocks of this many masked tokens (with --cache, of this many tokens of "
    "the text) from left to right; 0: one block",
)
_CACHE = flags.DEFINE_bool(
    "cache", False, "diffusion: keep the keys and values of finished blocks; needs --block"
)
_DRAFT = flags.DEFINE_integer(
    "draft", 0, "speculative: tokens per draft; 0: adaptive, from the acceptance rate", 0, MAX_DRAFT
)
_COMPARE = flags.DEFINE_bool(
    "compare",
    True,
    "speculative: also measure the speed of causal decoding, on up to 64 tokens per prompt; diffusion with "
    "--cache: measure the change in the held-out NELBO if the run was not trained on such blocks",
)
_OUTPUT = cli.DEFINE_path("output", "", "JSON lines file for the texts")
_WATCH = flags.DEFINE_bool("watch", None, "redraw the texts after every step; default: on a terminal")
flags.mark_flags_as_required(["workdir"])

_FLAGS_OF_MODES = {
    "--mode=diffusion": (_ORDER, _STEPS, _THRESHOLD, _BLOCK, _CACHE),
    "--mode=speculative": (_DRAFT,),
}


def main(_: Sequence[str]) -> None:
    cli.set_up_jax()
    _check_flags()
    sampling = SamplingParams(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    unmasking = UnmaskingParams(_ORDER.value, _STEPS.value, _THRESHOLD.value, _BLOCK.value)
    texts = [*_PROMPT.value, *(read_prompts(_PROMPTS.value) if _PROMPTS.value else [])] or [""]
    run = open_run(_WORKDIR.value, _CHECKPOINT.value, _PARAMETERS.value)
    prompts = [encode_prompt(run.tokenizer, text) for text in texts]
    key_B = prompt_keys(_SEED.value, prompts)
    drafts = DraftCounts() if _MODE.value == "speculative" else None
    counts = ForwardCounts() if _CACHE.value else drafts
    speculation = SpeculationParams(_DRAFT.value)
    states = generate(
        run, prompts, _MODE.value, _TOKENS.value, sampling, unmasking, key_B, speculation, counts,
        _CACHE.value,
    )  # fmt: skip
    if _OUTPUT.value:
        check_output(user_path(_OUTPUT.value), "--output")
    _warn_if_long(prompts, run)
    if _CACHE.value:
        _warn_if_approximate(run)

    watch = sys.stdout.isatty() if _WATCH.value is None else _WATCH.value
    throughput = Throughput(_MODE.value, run.tokenizer.special.mask, counts)
    with LiveText() if watch else contextlib.nullcontext() as screen:
        for tokens in states:
            throughput.update(tokens)
            if screen:
                screen.draw("\n\n".join(show(run.tokenizer, text) for text in tokens))
                throughput.resume()
    shown = [show(run.tokenizer, text) for text in tokens]
    if _OUTPUT.value:  # before printing, which fails when stdout is closed
        lines = [
            json.dumps({"prompt": prompt, "text": text, "tokens": ids, "mode": _MODE.value}) + "\n"
            for prompt, text, ids in zip(texts, shown, tokens, strict=True)
        ]
        write_output(user_path(_OUTPUT.value), "".join(lines), "--output")
    print("\n\n".join(shown))
    summary = throughput.summary()
    if drafts and _COMPARE.value:
        speed = causal_speed(run, prompts, _TOKENS.value, sampling, key_B, speculation)
        summary += f"; causal decoding: {speed:.3g} tokens per second"
    print(f"[{summary}]", file=sys.stderr)


def _check_flags() -> None:
    """Raises `UserError` for flags that have no effect in the mode, or that need another flag."""
    cli.check_flags(_FLAGS_OF_MODES, f"--mode={_MODE.value}")
    if 0 <= _TEMPERATURE.value < GREEDY_BELOW:
        cli.check_flags({"a higher --temperature": (_TOP_K, _TOP_P)}, f"--temperature={_TEMPERATURE.value:g}")
    if _CACHE.value and not _BLOCK.value:
        raise UserError("--cache needs --block=N, the number of tokens per block, such as --block=32")


def _warn_if_approximate(run: TrainedRun) -> None:
    """Warns if the run was not trained on the blocks that --cache uses."""
    if reason := why_cache_is_approximate(run, _BLOCK.value):
        change = f"; {describe_block_nelbo(run, _BLOCK.value)}" if _COMPARE.value else ""
        warn(f"--cache is an approximation, because {run.workdir} {reason}{change}")


def _warn_if_long(prompts: list[list[int]], run: TrainedRun) -> None:
    mask, seq_len = run.tokenizer.special.mask, run.config.seq_len
    longest = max(len(prompt) + (0 if mask in prompt else _TOKENS.value) for prompt in prompts)
    if longest > seq_len:
        warn(f"texts may reach {longest} tokens, more than the sequence length in training ({seq_len})")


if __name__ == "__main__":
    cli.run(main)
