"""A trained run as a model of EleutherAI's lm-evaluation-harness, in any of its modes (extra `eval`).

    python -m dualsm.evaluation.harness --model dualsm --model_args workdir=runs/small,mode=prefix \\
        --tasks arc_easy,blimp --output_path scores

is lm_eval's own command line, all flags included, with the model `dualsm` made known to it first: lm_eval has
no way of finding models of other packages by itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dualsm.config import freeze
from dualsm.evaluation.harness_arguments import (
    command_line_as_json,
    read_integer,
    read_masks,
    read_model_args,
)
from dualsm.evaluation.modes import Scoring
from dualsm.evaluation.scoring import Item, Scorer, encode_pair
from dualsm.generation import batches, causal, diffusion
from dualsm.generation.sampling_params import SamplingParams
from dualsm.process.errors import UserError, explained
from dualsm.process.progress import bar, escape_unprintable, warn
from dualsm.rundir.trained_run import open_run

NAME = "dualsm"
_ROWS = 16  # most texts generated together
_DEFAULT_NEW_TOKENS = 256  # as in the harness's own models
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class GenerationRequest(NamedTuple):
    """What a task asks of a generated text.

    Attributes:
      until: strings that end it; they are no part of it.
      new_tokens: at most so many.
      sampling: how tokens are drawn.
    """

    until: tuple[str, ...]
    new_tokens: int
    sampling: SamplingParams


class HarnessModel:
    """The harness's three kinds of requests, answered by a run. A request has its strings in `args`."""

    def __init__(
        self,
        workdir: str = "",
        checkpoint: int | None = None,
        mode: str = "causal",
        masks: int | str | Sequence[int] = (1, 4),
        samples: int = 128,
        seed: int = 0,
        block: int = 32,
        steps: int = 0,
        **unknown,
    ):
        """What can be given as `--model_args`.

        Args:
          workdir: the run's folder.
          checkpoint: step of the checkpoint; None: the newest.
          mode: one of `dualsm.evaluation.modes.MODES`. Texts are generated left to right in the modes causal
            and prefix, by unmasking in the other two.
          masks: of the mode masked: 1, "1+4" or [1, 4].
          samples: of the mode monte_carlo.
          seed: of monte_carlo and of sampled texts. A text depends on it, the prompt, and the number of equal
            prompts before it.
          block, steps: of generation by unmasking, see `dualsm.generation.diffusion.Unmasking`.

        Raises:
          UserError: for unknown arguments and impossible values, and when there is no such run.
        """
        if unknown or not workdir:
            known = "workdir, checkpoint, mode, masks, samples, seed, block, steps"
            wrong = f"unknown {', '.join(unknown)}" if unknown else "no workdir"
            raise UserError(f"--model_args: {wrong}; the model {NAME} takes {known}")
        checkpoint = None if checkpoint is None else read_integer("checkpoint", checkpoint)
        samples, seed = read_integer("samples", samples), read_integer("seed", seed)
        block, steps = read_integer("block", block), read_integer("steps", steps)
        if not 0 <= seed < 2**32:
            raise UserError(f"--model_args: seed={seed} must lie in [0, 2^32)")
        self._unmasking = diffusion.Unmasking(
            block=read_integer("block", block), steps=read_integer("steps", steps)
        )
        self._run = run = open_run(str(workdir), checkpoint)
        run.check_mode(mode)
        self._scoring = Scoring(mode, read_masks(masks), samples, run.config.seq_len, seed)
        self._config = freeze(run.config.model)
        self._scorer = Scorer(self._config, run.params, run.tokenizer, run.mesh)

    def get_model_info(self) -> dict:
        """What the harness writes beside the results."""
        return {
            "workdir": str(self._run.workdir),
            "checkpoint": self._run.step,
            "scoring": self._scoring.settings(),
        }

    def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns the score of each (context, continuation), and True where the model finds it likeliest.

        A continuation that is longer than the model's rows is scored piece by piece, because the harness
        accepts nothing but a number.
        """
        pairs = [encode_pair(self._run.tokenizer, Item(*request.args)) for request in requests]
        longest = self._scoring.longest
        if long := sum(len(continuation) >= longest for _, continuation in pairs):
            warn(
                f"{long} continuations are longer than the {longest} tokens of the model's rows; "
                "they are scored piece by piece"
            )
        answers = self._score(pairs, disable_tqdm)
        if ties := _count_ties(requests, [score for score, _ in answers]):
            warn(f"{ties} questions have two best answers with equal scores; lm_eval takes the first of them")
        return answers

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Score of each whole text, `(text,)`; one longer than the model's rows goes piece by piece."""
        texts = self._run.tokenizer.encode([request.args[0] for request in requests])
        return [score for score, _ in self._score([([], text) for text in texts], disable_tqdm)]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], quiet: bool) -> list[tuple[float, bool]]:
        """Scores token ids of any length, and tells which continuations are the likeliest."""
        pieces = [(number, piece) for number, pair in enumerate(pairs) for piece in self._pieces(*pair)]
        scores = self._scorer.score_tokens([piece for _, piece in pieces], self._scoring, quiet=quiet)
        answers = [(0.0, True)] * len(pairs)
        parts = zip(scores.log_likelihood_N.tolist(), scores.greedy_N.tolist(), strict=True)
        for (number, _), (score, greedy) in zip(pieces, parts, strict=True):
            total, so_far = answers[number]
            answers[number] = total + score, so_far and greedy
        return answers

    def _pieces(self, context: list[int], text: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Every token once: full rows, and the rest after as much context as fits (cut by the scorer)."""
        size = self._scoring.longest - 1
        for start in range(0, len(text), size):
            yield context + text[:start], text[start : start + size]

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """A continuation of each `(context, options)`, without the string that ended it."""
        requests = [read_request(request.args[1], self._scoring.longest) for request in requests]
        prompts = self._run.tokenizer.encode([request.args[0] for request in requests])
        key_B = batches.prompt_keys(self._scoring.seed, prompts)
        order = sorted(range(len(requests)), key=lambda i: (requests[i].new_tokens, len(prompts[i])))
        texts = [""] * len(requests)
        with bar(total=len(requests), desc="generate", unit="text", disable=disable_tqdm) as progress:
            for members in _alike(order, requests, min(_ROWS, batches.texts_at_once(self._scoring.longest))):
                cut = [self._prompt(prompts[i], requests[i].new_tokens) for i in members]
                new = self._generate(cut, [requests[i] for i in members], key_B[np.array(members)])
                for i, text in zip(members, new, strict=True):
                    texts[i] = text
                progress.update(len(members))
        return texts

    def _prompt(self, prompt: list[int], new_tokens: int) -> list[int]:
        room = self._scoring.longest - 1 - new_tokens
        return [self._run.tokenizer.special.bos, *prompt[-room:]]

    def _generate(
        self, prompts: list[list[int]], requests: list[GenerationRequest], key_B: jax.Array
    ) -> list[str]:
        """Continuations of prompts whose requests differ in `until` only."""
        texts = [""] * len(prompts)
        for states in self._states(prompts, requests[0], key_B):
            new = [tokens[len(prompt) :] for tokens, prompt in zip(states, prompts, strict=True)]
            texts = [self._settled(tokens) for tokens in new]
            if all(
                _end(text, request.until) < len(text) for text, request in zip(texts, requests, strict=True)
            ):
                break
        return [text[: _end(text, request.until)] for text, request in zip(texts, requests, strict=True)]

    def _states(
        self, prompts: list[list[int]], request: GenerationRequest, key_B: jax.Array
    ) -> Iterator[list[list[int]]]:
        """The texts as they grow or settle."""
        run, special = self._run, self._run.tokenizer.special
        mode = self._scoring.mode
        if mode in causal.MODES:
            return causal.generate(
                self._config, run.params, prompts, request.new_tokens, request.sampling, special, mode, key_B
            )
        masked = [prompt + [special.mask] * request.new_tokens for prompt in prompts]
        return diffusion.fill(
            self._config, run.params, masked, request.sampling, self._unmasking, special, key_B
        )

    def _settled(self, tokens: list[int]) -> str:
        """The text before the first mask."""
        mask = self._run.tokenizer.special.mask
        settled = tokens[: tokens.index(mask)] if mask in tokens else tokens
        return self._run.tokenizer.decode(settled, inside=True)


def _count_ties(requests: Sequence, scores: Sequence[float]) -> int:
    """Counts the questions whose two best answers have the same score."""
    questions: dict[tuple, list[float]] = {}
    for request, score in zip(requests, scores, strict=True):
        questions.setdefault((request.task_name, request.doc_id), []).append(score)
    best = [sorted(answers)[-2:] for answers in questions.values() if len(answers) > 1]
    return sum(first == second for first, second in best)


def read_request(options: dict, longest: int) -> GenerationRequest:
    """A task's `generation_kwargs`; without `do_sample` or a temperature, the likeliest token is taken.

    Args:
      options: theirs.
      longest: tokens of the model's rows; a text never takes more than half of them.

    Raises:
      UserError: for options that are not known here.
    """
    options = {name: value for name, value in options.items() if value is not None}
    until = options.pop("until", [])
    until = (until,) if isinstance(until, str) else tuple(until)
    try:
        new_tokens = [int(options.pop(name)) for name in _NEW_TOKENS if name in options]
        temperature = float(options.pop("temperature", 0.0 if not options.get("do_sample") else 1.0))
        top_k, top_p = int(options.pop("top_k", 0)), float(options.pop("top_p", 1.0))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"generation_kwargs: a number was expected: {error}") from error
    sampling = SamplingParams(temperature if options.pop("do_sample", True) else 0.0, top_k, top_p)
    if options:
        raise UserError(f"generation_kwargs: the model {NAME} does not know {', '.join(options)}")
    most = min((new_tokens or [_DEFAULT_NEW_TOKENS])[0], longest // 2)
    if most < 1:
        raise UserError(f"generation_kwargs: at least one token must be generated, not {most}")
    return GenerationRequest(tuple(filter(None, until)), most, sampling)


def _alike(order: Iterable[int], requests: Sequence[GenerationRequest], most: int) -> Iterator[list[int]]:
    """Requests in groups that can be generated together: at most `most`, and drawn in the same way."""
    groups: dict[tuple, list[int]] = {}
    for i in order:
        members = groups.setdefault(requests[i][1:], [])
        members.append(i)
        if len(members) == most:
            yield groups.pop(requests[i][1:])
    yield from groups.values()


def _end(text: str, until: Sequence[str]) -> int:
    """Where the first of the strings begins; the text's length when there is none."""
    return min((text.index(string) for string in until if string in text), default=len(text))


@functools.cache
def register() -> type:
    """Makes the model known to an installed lm_eval under `NAME`, and returns its class.

    Raises:
      UserError: when lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UserError("lm_eval is not installed: pip install 'dualsm[eval]'") from error

    @register_model(NAME)
    class Registered(HarnessModel, LM):
        def __init__(self, batch_size=None, max_batch_size=None, device=None, **arguments):
            # Batch sizes and devices are chosen by the scorer.
            LM.__init__(self)
            HarnessModel.__init__(self, **arguments)

        @classmethod
        def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None):
            return cls.create_from_arg_obj(read_model_args(arg_string), additional_config)

    return Registered


def main() -> None:
    """lm_eval's command line; what the user can mend ends in one line and exit status 2."""
    from absl import logging

    from dualsm.process import cli

    escape_unprintable()
    logging.set_verbosity(logging.ERROR)  # Orbax tells its life story below it
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli.set_up_jax()
        sys.argv = ["lm_eval", *command_line_as_json(sys.argv[1:])]
        cli_evaluate()
    except Exception as error:
        if text := explained(error):
            cli.fail(text)
        raise


if __name__ == "__main__":
    main()
