"""Text generation with a trained run, in any of its modes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dualsm.config import freeze
from dualsm.generation import autoregressive, diffusion
from dualsm.generation.diffusion import UnmaskingParams
from dualsm.generation.sampling_params import SamplingParams
from dualsm.objectives.shares import trained_objectives
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun

MODES = (*autoregressive.MODES, "diffusion")


def check_mode(run: TrainedRun, mode: str) -> None:
    """Checks that a run can be used in a mode of generation or evaluation.

    All modes read the prediction for position i from the logits at position i - 1. A model trained with
    `shifted=False` predicts masked tokens elsewhere, so its results in these modes would be meaningless.

    Raises:
      UserError: if the mode fills in masks and the run was trained with unshifted masked diffusion.
    """
    trained = "masked_diffusion" in trained_objectives(run.config)
    if mode not in autoregressive.MODES and trained and not run.config.objectives.masked_diffusion.shifted:
        raise UserError(
            f"mode {mode} needs a shifted model, but {run.workdir} was trained with "
            f"objectives.masked_diffusion.shifted=False; use mode {' or '.join(autoregressive.MODES)}"
        )


def generate(
    run: TrainedRun,
    prompts: Sequence[list[int]],
    mode: str,
    new_tokens: int,
    sampling: SamplingParams,
    unmasking: UnmaskingParams | None = None,
    key_B: jax.Array | None = None,
) -> Iterator[list[list[int]]]:
    """Generates texts, and yields their intermediate states.

    Args:
      run: the run.
      prompts: token ids, `<s>` first; see `prompts.encode_prompt`. In the mode "diffusion" the masks are
        filled in.
      mode: one of `MODES`.
      new_tokens: maximum number of tokens to add to each prompt that has no masks.
      sampling: sampling parameters.
      unmasking: unmasking parameters of the mode "diffusion"; None: the defaults.
      key_B: PRNG key of each prompt; None: keys of seed 0, see `prompt_batches.prompt_keys`.

    Returns:
      An iterator over the token ids of all texts, prompts included, after every few steps. The last item
      contains the finished texts.

    Raises:
      UserError: if the run or a prompt cannot be used in this mode.
    """
    check_mode(run, mode)
    config, special = freeze(run.config.model), run.tokenizer.special
    if mode == "diffusion":
        suffix = [special.mask] * new_tokens
        masked = [prompt if special.mask in prompt else [*prompt, *suffix] for prompt in prompts]
        unmasking = unmasking or UnmaskingParams()
        return diffusion.infill(config, run.params, masked, sampling, unmasking, special, key_B)
    if any(special.mask in prompt for prompt in prompts):
        raise UserError(f"a prompt contains <mask>, which --mode={mode} cannot fill in; use --mode=diffusion")
    return autoregressive.generate(config, run.params, prompts, new_tokens, sampling, special, mode, key_B)


class Throughput:
    """Counts the generated tokens, the forward passes and the time from one state to the next."""

    def __init__(self, mode: str, mask: int):
        """
        Args:
          mode: one of `MODES`.
          mask: id of `<mask>`.
        """
        self._mode, self._mask = mode, mask
        self._times: list[float] = []
        self._counts: list[list[int]] = []

    def update(self, texts: Sequence[list[int]]) -> None:
        """Records a state that `generate` yielded."""
        self._times.append(time.perf_counter())
        self._counts.append([len(tokens) - tokens.count(self._mask) for tokens in texts])

    def summary(self) -> str:
        """Returns one line with the number of tokens, forward passes per token and tokens per second.

        The first interval, which is mostly compilation, does not count towards tokens per second.
        """
        counts_SxB = np.array(self._counts)
        new_tokens = (counts_SxB[-1] - counts_SxB[0]).sum()
        # A forward pass of diffusion unmasks at least one token of each text that has masks; one of the other
        # modes adds exactly one token.
        forwards = (np.diff(counts_SxB, axis=0) > 0).sum() if self._mode == "diffusion" else new_tokens
        first = 1 if len(self._times) > 2 else 0
        tokens = (counts_SxB[-1] - counts_SxB[first]).sum()
        seconds = self._times[-1] - self._times[first]
        return (
            f"[{new_tokens} tokens, {forwards / max(new_tokens, 1):.2f} forward passes per token, "
            f"{tokens / max(seconds, 1e-9):.3g} tokens per second]"
        )
