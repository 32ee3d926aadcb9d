"""lm-evaluation-harness adapter: a trained run as a harness model, in any of its modes (extra `eval`).

    python -m dualsm.evaluation.harness --model dualsm --model_args workdir=runs/small,mode=prefix \\
        --tasks arc_easy,blimp --output_path scores

is lm_eval's own command line with all its flags. It registers the model `dualsm` first, because lm_eval does
not discover models of other packages.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dualsm.config import freeze
from dualsm.evaluation.harness_arguments import (
    command_line_as_json,
    read_integer,
    read_masks,
    read_model_args,
)
from dualsm.evaluation.harness_requests import GenerationRequest, batch_requests, read_request
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Item, Scorer, encode_pair
from dualsm.generation import autoregressive, prompt_batches
from dualsm.generation.diffusion import UnmaskingParams
from dualsm.generation.generate import check_mode, generate
from dualsm.generation.speculative import SpeculationParams
from dualsm.process.errors import UserError, user_message
from dualsm.process.progress import bar, escape_unprintable, warn
from dualsm.rundir.trained_run import PARAMETERS, open_run

NAME = "dualsm"
_BATCH_SIZE = 16  # texts generated together


class HarnessModel:
    """Answers the harness's three kinds of requests with a run; the strings of a request are in `args`."""

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
        parameters: str = "last",
        draft: int = 0,
        **unknown,
    ):
        """
        Args:
          workdir: run directory.
          checkpoint: step of the checkpoint; None: the newest.
          mode: one of `dualsm.evaluation.modes.MODES`, or "speculative", which scores as "causal". Texts are
            generated autoregressively in the modes causal and prefix, by speculative decoding in the mode
            speculative, and by unmasking in the other two.
          masks: numbers of masks in the mode masked: 1, "1+4" or [1, 4].
          samples: draws per item in the mode monte_carlo.
          seed: seed of the mode monte_carlo and of sampling. A text depends only on the seed, its prompt, and
            the number of equal prompts before it.
          parameters: "last" for the weights, "ema" for their moving average.
          draft: tokens per draft in the mode speculative; 0: adaptive, from the acceptance rate.
          block, steps: unmasking parameters, see `dualsm.generation.diffusion.UnmaskingParams`.

        Raises:
          UserError: if an argument is unknown or invalid, or the run or checkpoint does not exist.
        """
        if unknown or not workdir:
            known = "workdir, checkpoint, mode, masks, samples, seed, block, steps, draft, parameters"
            wrong = f"unknown {', '.join(unknown)}" if unknown else "no workdir"
            raise UserError(f"--model_args: {wrong}; the arguments of {NAME} are {known}")
        checkpoint = None if checkpoint is None else read_integer("checkpoint", checkpoint)
        samples, seed = read_integer("samples", samples), read_integer("seed", seed)
        if not 0 <= seed < 2**32:
            raise UserError(f"--model_args: seed={seed} must be in [0, 2^32)")
        self._unmasking = UnmaskingParams(
            block=read_integer("block", block), steps=read_integer("steps", steps)
        )
        self._speculation = SpeculationParams(read_integer("draft", draft))
        if parameters not in PARAMETERS:
            raise UserError(f"--model_args: parameters={parameters!r} must be {' or '.join(PARAMETERS)}")
        self._run = run = open_run(str(workdir), checkpoint, parameters)
        check_mode(run, mode)
        self._decoding = mode if mode in (*autoregressive.MODES, "speculative") else "diffusion"
        mode = "causal" if mode == "speculative" else mode
        self._scoring = ScoringParams(mode, read_masks(masks), samples, run.config.seq_len, seed)
        self._scorer = Scorer(freeze(run.config.model), run.params, run.tokenizer, run.mesh)

    def get_model_info(self) -> dict:
        """Returns information that the harness adds to `config` in its results."""
        return {
            "workdir": str(self._run.workdir),
            "checkpoint": self._run.step,
            "parameters": self._run.parameters,
            "scoring": self._scoring.settings(),
        }

    def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns, per (context, continuation), its score, and True if greedy decoding generates it.

        A continuation longer than the sequence length is scored in several windows, because the harness
        requires a number.
        """
        pairs = [encode_pair(self._run.tokenizer, Item(*request.args)) for request in requests]
        max_length = self._scoring.max_length
        if long := sum(len(continuation) >= max_length for _, continuation in pairs):
            warn(
                f"{long} continuations are longer than the sequence length ({max_length} tokens); "
                "each is scored in several windows"
            )
        answers = self._score(pairs, disable_tqdm)
        if ties := _count_ties(requests, [score for score, _ in answers]):
            warn(f"{ties} questions have two best answers with equal scores; lm_eval takes the first of them")
        return answers

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Returns the score of each text; texts longer than the sequence length are scored in windows."""
        texts = self._run.tokenizer.encode([request.args[0] for request in requests])
        return [score for score, _ in self._score([([], text) for text in texts], disable_tqdm)]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], quiet: bool) -> list[tuple[float, bool]]:
        """Scores pairs of context and continuation of any length, given as token ids."""
        windows = [(index, window) for index, pair in enumerate(pairs) for window in self._windows(*pair)]
        scores = self._scorer.score_tokens([window for _, window in windows], self._scoring, quiet=quiet)
        answers = [(0.0, True)] * len(pairs)
        parts = zip(scores.log_likelihood_N.tolist(), scores.greedy_N.tolist(), strict=True)
        for (index, _), (score, greedy) in zip(windows, parts, strict=True):
            total, all_greedy = answers[index]
            answers[index] = total + score, all_greedy and greedy
        return answers

    def _windows(self, context: list[int], text: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Divides a text into full sequences and a rest, each after its context (truncated by the scorer)."""
        size = self._scoring.max_length - 1
        for start in range(0, len(text), size):
            yield context + text[:start], text[start : start + size]

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Returns a continuation of each `(context, options)`, without the stop string that ended it."""
        max_length, encode = self._scoring.max_length, self._run.tokenizer.encode
        prompts = encode([request.args[0] for request in requests])
        requests = [read_request(request.args[1], max_length) for request in requests]
        key_B = prompt_batches.prompt_keys(self._scoring.seed, prompts)
        order = sorted(range(len(requests)), key=lambda i: (requests[i].new_tokens, len(prompts[i])))
        batch_size = min(_BATCH_SIZE, prompt_batches.max_batch_size(max_length))
        texts = [""] * len(requests)
        with bar(total=len(requests), desc="generate", unit="text", disable=disable_tqdm) as progress:
            for members in batch_requests(order, requests, batch_size):
                truncated = [self._truncate(prompts[i], requests[i].new_tokens) for i in members]
                new = self._generate(truncated, [requests[i] for i in members], key_B[np.array(members)])
                for i, text in zip(members, new, strict=True):
                    texts[i] = text
                progress.update(len(members))
        return texts

    def _truncate(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Returns `<s>` and the prompt, truncated on the left to leave room for `new_tokens` tokens."""
        room = self._scoring.max_length - 1 - new_tokens
        return [self._run.tokenizer.special.bos, *prompt[-room:]]

    def _generate(
        self, prompts: list[list[int]], requests: list[GenerationRequest], key_B: jax.Array
    ) -> list[str]:
        """Generates continuations for requests that differ only in `until`."""
        texts = [""] * len(prompts)
        states = generate(
            self._run, prompts, self._decoding, requests[0].new_tokens, requests[0].sampling,
            self._unmasking, key_B, self._speculation,
        )  # fmt: skip
        for state in states:
            new = [tokens[len(prompt) :] for tokens, prompt in zip(state, prompts, strict=True)]
            texts = [self._decode(tokens) for tokens in new]
            if all(request.stop(text) < len(text) for text, request in zip(texts, requests, strict=True)):
                break
        return [text[: request.stop(text)] for text, request in zip(texts, requests, strict=True)]

    def _decode(self, tokens: list[int]) -> str:
        """Decodes the tokens before the first mask."""
        mask = self._run.tokenizer.special.mask
        tokens = tokens[: tokens.index(mask)] if mask in tokens else tokens
        return self._run.tokenizer.decode(tokens, inside=True)


def _count_ties(requests: Sequence, scores: Sequence[float]) -> int:
    """Counts the questions whose two best answers have the same score."""
    questions: dict[tuple, list[float]] = {}
    for request, score in zip(requests, scores, strict=True):
        questions.setdefault((request.task_name, request.doc_id), []).append(score)
    best = [sorted(answers)[-2:] for answers in questions.values() if len(answers) > 1]
    return sum(first == second for first, second in best)


@functools.cache
def register() -> type:
    """Registers the model with lm_eval under `NAME`, and returns its class.

    Raises:
      UserError: if lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UserError("lm_eval is not installed: pip install 'dualsm[eval]'") from error

    @register_model(NAME)
    class Registered(HarnessModel, LM):
        def __init__(self, batch_size=None, max_batch_size=None, device=None, **arguments):
            # Ignores the harness's batch size and device; the scorer chooses them.
            LM.__init__(self)
            HarnessModel.__init__(self, **arguments)

        @classmethod
        def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None):
            return cls.create_from_arg_obj(read_model_args(arg_string), additional_config)

    return Registered


def main() -> None:
    """Runs lm_eval's command line; user errors print one line and exit with status 2."""
    from absl import logging

    from dualsm.process import cli

    escape_unprintable()
    logging.set_verbosity(logging.ERROR)  # hides Orbax's log lines
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli.set_up_jax()
        sys.argv = ["lm_eval", *command_line_as_json(sys.argv[1:])]
        cli_evaluate()
    except Exception as error:
        if text := user_message(error):
            cli.fail(text)
        raise


if __name__ == "__main__":
    main()
