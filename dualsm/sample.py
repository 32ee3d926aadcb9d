"""Generates text with a trained run, in any of its modes; shows tokens as they settle.

python -m dualsm.sample --workdir=runs/tiny --mode=causal --prompt='def main('
python -m dualsm.sample --workdir=runs/tiny --mode=diffusion --prompt='def <mask:8>: return x'
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from dualsm import cli
from dualsm.config import freeze
from dualsm.data.tokenizer import RESERVED_IDS, Tokenizer
from dualsm.errors import UserError
from dualsm.evaluation.run import TrainedRun, open_run
from dualsm.generation import causal, diffusion
from dualsm.generation.pick import Picking

MODES = (*causal.MODES, "diffusion")

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
_CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "step of the checkpoint; default: the newest")
_MODE = flags.DEFINE_enum("mode", "causal", MODES, "how to generate")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "prompt; repeat the flag for several, which are run together"
)
_PROMPTS = flags.DEFINE_string(
    "prompts", "", "file of prompts: .jsonl with a field `prompt`, or a prompt a line"
)
_TOKENS = flags.DEFINE_integer("tokens", 64, "tokens to add to a prompt without masks", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token")
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw among this many likeliest tokens; 0: all")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "draw among the likeliest tokens of this joint probability")
_SEED = flags.DEFINE_integer("seed", 0, "of the draws")
_ORDER = flags.DEFINE_enum("order", "confidence", diffusion.ORDERS, "diffusion: which places settle first")
_STEPS = flags.DEFINE_integer("steps", 0, "diffusion: forwards a block; 0: one a token")
_THRESHOLD = flags.DEFINE_float("threshold", 0.0, "diffusion: settle all above this probability at once")
_BLOCK = flags.DEFINE_integer(
    "block", 0, "diffusion: settle blocks of this many tokens left to right; 0: all"
)
_OUTPUT = flags.DEFINE_string("output", "", "file for the texts, as JSON lines")
_WATCH = flags.DEFINE_bool("watch", None, "show tokens as they settle; default: on a terminal")
flags.mark_flags_as_required(["workdir"])

_MASKS = re.compile(r"<mask(?::(\d+))?>")


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt with `<s>` in front; `<mask>` and `<mask:8>` become one and eight masks."""
    tokens, position = [tokenizer.special.bos], 0
    for match in _MASKS.finditer(prompt):
        tokens += tokenizer.encode([prompt[position : match.start()]])[0]
        tokens += [tokenizer.special.mask] * int(match[1] or 1)
        position = match.end()
    return tokens + tokenizer.encode([prompt[position:]])[0]


def read_prompts(path: str) -> list[str]:
    """Prompts from a file. Raises `UserError` with the line of what cannot be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: cannot read {path}: {error}") from error
    if not path.endswith(".jsonl"):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: no JSON object with a field `prompt`") from error
    return prompts


def run_mode(run: TrainedRun, prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """The texts as they grow or settle, by the flags."""
    picking = Picking(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    special, config = run.tokenizer.special, freeze(run.config.model)
    if _MODE.value != "diffusion":
        yield from causal.generate(
            config, run.params, prompts, _TOKENS.value, picking, special, _MODE.value, _SEED.value
        )
        return
    unmasking = diffusion.Unmasking(_ORDER.value, _STEPS.value, _THRESHOLD.value, _BLOCK.value)
    texts = [p if special.mask in p else p + [special.mask] * _TOKENS.value for p in prompts]
    yield from diffusion.fill(config, run.params, texts, picking, unmasking, special, _SEED.value)


def show(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """A text with its masks visible."""
    parts, run = [], []
    for token in tokens:
        if token >= RESERVED_IDS:
            run.append(token)
        elif token == tokenizer.special.mask:
            parts += [tokenizer.decode(run), "░"]
            run = []
    return "".join([*parts, tokenizer.decode(run)])


def main(_: Sequence[str]) -> None:
    cli.use_compilation_cache()
    texts = [*_PROMPT.value, *(read_prompts(_PROMPTS.value) if _PROMPTS.value else [])] or [""]
    run = open_run(_WORKDIR.value, _CHECKPOINT.value)
    prompts = [encode_prompt(run.tokenizer, text) for text in texts]
    if _MODE.value != "diffusion" and any(run.tokenizer.special.mask in p for p in prompts):
        raise UserError(f"--mode={_MODE.value} cannot fill in <mask>; use --mode=diffusion")

    watch = sys.stdout.isatty() if _WATCH.value is None else _WATCH.value
    screen = _Screen() if watch else None
    start, compiled, forwards, states = time.perf_counter(), 0.0, 0, None
    for states in run_mode(run, prompts):
        if forwards == 1:
            compiled = time.perf_counter() - start  # the first forward's time is mostly compilation
        forwards += 1
        if screen:
            screen.draw([show(run.tokenizer, tokens) for tokens in states])
    seconds = time.perf_counter() - start
    shown = [show(run.tokenizer, tokens) for tokens in states]
    if not screen:
        print("\n\n".join(shown))
    print(_report(run, prompts, states, forwards, seconds - compiled), file=sys.stderr)
    if _OUTPUT.value:
        lines = [
            {"prompt": prompt, "text": text, "tokens": tokens, "mode": _MODE.value}
            for prompt, text, tokens in zip(texts, shown, states, strict=True)
        ]
        Path(_OUTPUT.value).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _report(run: TrainedRun, prompts, states, yields: int, seconds: float) -> str:
    """Forwards per token and tokens per second, of all texts together."""
    mask = run.tokenizer.special.mask
    if _MODE.value == "diffusion":
        new = sum(text.count(mask) or _TOKENS.value for text in prompts)
        forwards = yields - 1
        each = max(text.count(mask) or _TOKENS.value for text in prompts)
    else:
        counts = [len(after) - len(before) for before, after in zip(prompts, states, strict=True)]
        new, each = sum(counts), max(max(counts), 1)
        forwards = each
    return f"[{new} tokens, {forwards / each:.2f} forwards a token, {new / max(seconds, 1e-9):.0f} tokens/s]"


class _Screen:
    """Redraws a few texts in place on a terminal."""

    def __init__(self):
        self._lines = 0

    def draw(self, texts: list[str]) -> None:
        text = "\n\n".join(texts)
        up = f"\x1b[{self._lines}F\x1b[J" if self._lines else ""
        print(f"{up}{text}", flush=True)
        self._lines = _height(text)


def _height(text: str) -> int:
    """Lines that a text takes on the terminal."""
    import shutil

    columns = shutil.get_terminal_size().columns
    return sum(max(1, -(-len(line) // columns)) for line in text.split("\n"))


if __name__ == "__main__":
    cli.run(main)
