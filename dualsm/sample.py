"""Generates text with a trained run, in any of its modes; shows tokens as they settle.

python -m dualsm.sample --workdir=runs/tiny --mode=causal --prompt='def main('
python -m dualsm.sample --workdir=runs/tiny --mode=diffusion --prompt='def <mask:8>: return x'
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from dualsm.config import freeze
from dualsm.generation import causal, diffusion
from dualsm.generation.batches import prompt_keys
from dualsm.generation.prompts import encode_prompt, read_prompts, show
from dualsm.generation.sampling_params import SamplingParams
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.output import check_output, write_output
from dualsm.process.progress import warn
from dualsm.rundir.trained_run import TrainedRun, open_run

MODES = (*causal.MODES, "diffusion")

_WORKDIR = cli.DEFINE_path("workdir", None, "folder of the run")
_CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "step of the checkpoint; default: the newest")
_MODE = flags.DEFINE_enum("mode", "causal", MODES, "how to generate")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "prompt; repeat the flag for several, which are run together"
)
_PROMPTS = cli.DEFINE_path("prompts", "", "file of prompts: .jsonl with a field `prompt`, or a prompt a line")
_TOKENS = flags.DEFINE_integer("tokens", 64, "tokens to add to a prompt without masks", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token")
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw among this many likeliest tokens; 0: all")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "draw among the likeliest tokens of this joint probability")
_SEED = flags.DEFINE_integer(
    "seed", 0, "of the draws; a text depends on it and on its own prompt only", 0, 2**32 - 1
)
_ORDER = flags.DEFINE_enum("order", "confidence", diffusion.ORDERS, "diffusion: which places settle first")
_STEPS = flags.DEFINE_integer("steps", 0, "diffusion: forwards a block; 0: one a token")
_THRESHOLD = flags.DEFINE_float("threshold", 0.0, "diffusion: settle all above this probability at once")
_BLOCK = flags.DEFINE_integer(
    "block", 0, "diffusion: settle blocks of this many tokens left to right; 0: all"
)
_OUTPUT = cli.DEFINE_path("output", "", "file for the texts, as JSON lines")
_WATCH = flags.DEFINE_bool("watch", None, "show tokens as they settle; default: on a terminal")
flags.mark_flags_as_required(["workdir"])


def run_mode(
    run: TrainedRun, prompts: list[list[int]], sampling: SamplingParams, unmasking: diffusion.Unmasking
) -> Iterator[list[list[int]]]:
    """The texts as they grow or settle, in the mode and with the seed of the flags."""
    special, config = run.tokenizer.special, freeze(run.config.model)
    key_B = prompt_keys(_SEED.value, prompts)
    if _MODE.value != "diffusion":
        yield from causal.generate(
            config, run.params, prompts, _TOKENS.value, sampling, special, _MODE.value, key_B
        )
        return
    texts = [p if special.mask in p else p + [special.mask] * _TOKENS.value for p in prompts]
    yield from diffusion.fill(config, run.params, texts, sampling, unmasking, special, key_B)


def main(_: Sequence[str]) -> None:
    cli.set_up_jax()
    sampling = SamplingParams(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    unmasking = diffusion.Unmasking(_ORDER.value, _STEPS.value, _THRESHOLD.value, _BLOCK.value)
    texts = [*_PROMPT.value, *(read_prompts(_PROMPTS.value) if _PROMPTS.value else [])] or [""]
    run = open_run(_WORKDIR.value, _CHECKPOINT.value)
    run.check_mode(_MODE.value)
    prompts = [encode_prompt(run.tokenizer, text) for text in texts]
    if _MODE.value != "diffusion" and any(run.tokenizer.special.mask in p for p in prompts):
        raise UserError(f"--mode={_MODE.value} cannot fill in <mask>; use --mode=diffusion")
    if _OUTPUT.value:
        check_output(Path(_OUTPUT.value), "--output")

    _warn_of_length(prompts, run)

    watch = sys.stdout.isatty() if _WATCH.value is None else _WATCH.value
    screen = _Screen() if watch else None
    mask, times, counts, states = run.tokenizer.special.mask, [], [], None
    for states in run_mode(run, prompts, sampling, unmasking):
        times.append(time.perf_counter())
        counts.append([len(tokens) - tokens.count(mask) for tokens in states])
        if screen:
            screen.draw([show(run.tokenizer, tokens) for tokens in states])
    shown = [show(run.tokenizer, tokens) for tokens in states]
    if _OUTPUT.value:  # before printing, which fails when stdout is closed
        lines = [
            {"prompt": prompt, "text": text, "tokens": tokens, "mode": _MODE.value}
            for prompt, text, tokens in zip(texts, shown, states, strict=True)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_output(Path(_OUTPUT.value), text, "--output")
    if screen:
        screen.finish(shown)
    else:
        print("\n\n".join(shown))
    print(_report(times, np.array(counts)), file=sys.stderr)


def _warn_of_length(prompts: list[list[int]], run: TrainedRun) -> None:
    mask = run.tokenizer.special.mask
    longest = max(len(prompt) + (0 if mask in prompt else _TOKENS.value) for prompt in prompts)
    if longest > run.config.seq_len:
        warn(f"texts of up to {longest} tokens; the model was trained on {run.config.seq_len} at most")


def _report(times: list[float], counts_SxB: np.ndarray) -> str:
    """Forwards per token, and tokens per second of all texts together.

    Args:
      times: when each state was there, in seconds.
      counts_SxB: settled tokens of each text in each state.
    """
    new_B = counts_SxB[-1] - counts_SxB[0]
    # Each forward settles at least one token of a text that has masks, and left to right exactly one.
    forwards = (np.diff(counts_SxB, axis=0) > 0).sum() if _MODE.value == "diffusion" else new_B.sum()
    first = 1 if len(times) > 2 else 0  # the first forward's time is mostly compilation
    tokens, seconds = (counts_SxB[-1] - counts_SxB[first]).sum(), times[-1] - times[first]
    return (
        f"[{new_B.sum()} tokens, {forwards / max(new_B.sum(), 1):.2f} forwards a token, "
        f"{tokens / max(seconds, 1e-9):.3g} tokens/s]"
    )


class _Screen:
    """Redraws a few texts in place on a terminal; of long ones, the end that fits."""

    def __init__(self):
        self._lines = 0

    def draw(self, texts: list[str]) -> None:
        columns, rows = shutil.get_terminal_size()
        whole = "\n\n".join(texts).split("\n")
        lines = [line[i : i + columns] for line in whole for i in range(0, len(line) or 1, columns)]
        up = f"\x1b[{self._lines}F\x1b[J" if self._lines else ""
        print(up + "\n".join(lines[-(rows - 1) :]), flush=True)
        self._lines = min(len(lines), rows - 1)

    def finish(self, texts: list[str]) -> None:
        """Leaves the whole texts on the screen."""
        up = f"\x1b[{self._lines}F\x1b[J" if self._lines else ""
        print(up + "\n\n".join(texts), flush=True)


if __name__ == "__main__":
    cli.run(main)
