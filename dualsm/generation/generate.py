"""Text generation with a trained run, in any of its modes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dualsm.config import freeze
from dualsm.generation import autoregressive, cached_diffusion, diffusion, prompt_batches, speculative
from dualsm.generation.cached_diffusion import ForwardCounts
from dualsm.generation.diffusion import UnmaskingParams
from dualsm.generation.draft_counts import DraftCounts
from dualsm.generation.sampling_params import SamplingParams
from dualsm.generation.speculative import SpeculationParams
from dualsm.objectives.shares import trained_objectives
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun

_COMPARED_TOKENS = 64  # per text, to compare the speed of causal decoding
MODES = (*autoregressive.MODES, "diffusion", "speculative")


def check_mode(run: TrainedRun, mode: str) -> None:
    """Checks that a run can be used in a mode of generation or evaluation.

    All modes read the prediction for position i from the logits at position i - 1. A model trained with
    `shifted=False` predicts masked tokens elsewhere, so its results in these modes would be meaningless.

    Raises:
      UserError: if the mode fills in masks and the run was trained with unshifted masked diffusion.
    """
    if mode not in autoregressive.MODES and not is_shifted(run):
        raise UserError(
            f"mode {mode} needs a shifted model, but {run.workdir} was trained with "
            f"objectives.masked_diffusion.shifted=False; use mode {' or '.join(autoregressive.MODES)}"
        )


def is_shifted(run: TrainedRun) -> bool:
    """Returns False if the run was trained with unshifted masked diffusion."""
    trained = "masked_diffusion" in trained_objectives(run.config)
    return not trained or run.config.objectives.masked_diffusion.shifted


def why_cache_is_approximate(run: TrainedRun, block: int) -> str | None:
    """Returns why unmasking blocks of `block` tokens with a cache differs from training; None if not."""
    if "block_diffusion" not in trained_objectives(run.config):
        return "was not trained with block_diffusion"
    options = run.config.objectives.block_diffusion
    if options.form != "noisy":
        return f"was trained with objectives.block_diffusion.form={options.form}"
    drawn = options.block == 0 and block <= run.config.seq_len and not block & (block - 1)
    if not drawn and options.block != block:
        return f"was trained with objectives.block_diffusion.block={options.block}"
    return None


def generate(
    run: TrainedRun,
    prompts: Sequence[list[int]],
    mode: str,
    new_tokens: int,
    sampling: SamplingParams,
    unmasking: UnmaskingParams | None = None,
    key_B: jax.Array | None = None,
    speculation: SpeculationParams | None = None,
    counts: DraftCounts | ForwardCounts | None = None,
    cache: bool = False,
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
      speculation: parameters of the drafts in the mode "speculative"; None: the defaults.
      counts: `DraftCounts` or `DraftRecord` of the mode "speculative", or `ForwardCounts` of unmasking with a
        cache, to be updated; None: not counted.
      cache: unmask blocks of `unmasking.block` tokens with a cache of the finished ones.

    Returns:
      An iterator over the token ids of all texts, prompts included, after every few steps. The last item
      contains the finished texts.

    Raises:
      UserError: if the run or a prompt cannot be used in this mode, or if the mode has no such cache.
    """
    check_mode(run, mode)
    if cache and mode != "diffusion":
        raise UserError(f"cache=True has no effect in mode {mode}; use it in mode diffusion")
    config, special = freeze(run.config.model), run.tokenizer.special
    if mode == "diffusion":
        suffix = [special.mask] * new_tokens
        masked = [prompt if special.mask in prompt else [*prompt, *suffix] for prompt in prompts]
        unmasking = unmasking or UnmaskingParams()
        arguments = (config, run.params, masked, sampling, unmasking, special, key_B)
        return cached_diffusion.infill_blocks(*arguments, counts) if cache else diffusion.infill(*arguments)
    if any(special.mask in prompt for prompt in prompts):
        raise UserError(f"a prompt contains <mask>, which --mode={mode} cannot fill in; use --mode=diffusion")
    if mode == "speculative":
        speculation = speculation or SpeculationParams()
        return speculative.generate(
            config, run.params, prompts, new_tokens, sampling, special, speculation, key_B, counts
        )
    return autoregressive.generate(config, run.params, prompts, new_tokens, sampling, special, mode, key_B)


class Throughput:
    """Counts the generated tokens, the forward passes and the time from one state to the next."""

    def __init__(self, mode: str, mask: int, counts: DraftCounts | ForwardCounts | None = None):
        """
        Args:
          mode: one of `MODES`.
          mask: id of `<mask>`.
          counts: counts that `generate` updates.
        """
        self._mode, self._mask = mode, mask
        self._drafts = counts if isinstance(counts, DraftCounts) else None
        self._passes = counts if isinstance(counts, ForwardCounts) else None
        self._starts: list[float] = []  # of the interval after each state
        self._ends: list[float] = []  # of the interval before each state
        self._counts: list[list[int]] = []
        self._forwards: list[int] = []

    def update(self, texts: Sequence[list[int]]) -> None:
        """Records a state that `generate` yielded."""
        self._ends.append(time.perf_counter())
        self._starts.append(self._ends[-1])
        self._counts.append([len(tokens) - tokens.count(self._mask) for tokens in texts])
        self._forwards.append(self._passes.forwards if self._passes else 0)

    def resume(self) -> None:
        """Excludes the time since the last `update`, such as that of drawing the texts."""
        self._starts[-1] = time.perf_counter()

    @property
    def new_tokens(self) -> int:
        """Number of generated tokens of all texts."""
        return sum(self._counts[-1]) - sum(self._counts[0])

    def tokens_per_second(self) -> float:
        """Returns the generated tokens per second of decoding.

        Excludes intervals without a new token, or without a forward pass if these are counted, such as
        compilation and prefill.
        """
        tokens_S = np.diff([sum(counts) for counts in self._counts])
        is_decoding_S = np.diff(self._forwards) > 0 if self._passes else tokens_S > 0
        seconds_S = np.subtract(self._ends[1:], self._starts[:-1])
        return tokens_S.sum() / max(seconds_S[is_decoding_S].sum(), 1e-9)

    def forwards(self) -> int:
        """Returns the number of forward passes, summed over texts."""
        if self._passes:
            return self._passes.forwards
        if self._drafts:
            return 2 * self._drafts.drafts
        # A pass of diffusion unmasks at least one token of each text that has masks; one of the other modes
        # adds exactly one token.
        is_diffusion = self._mode == "diffusion"
        return int((np.diff(self._counts, axis=0) > 0).sum()) if is_diffusion else self.new_tokens

    def summary(self) -> str:
        """Returns one line with the number of tokens, forward passes per token and tokens per second."""
        speed, forwards = f"{self.tokens_per_second():.3g} tokens per second", self.forwards()
        if self._drafts:
            accepted = self._drafts.accepted / max(self._drafts.drafts, 1)
            per_pass = self.new_tokens / max(forwards, 1)
            return (
                f"{self.new_tokens} tokens, {per_pass:.2f} tokens per forward pass, "
                f"{accepted:.2f} accepted tokens per draft, {speed}"
            )
        per_token = forwards / max(self.new_tokens, 1)
        return f"{self.new_tokens} tokens, {per_token:.2f} forward passes per token, {speed}"


def causal_speed(
    run: TrainedRun,
    prompts: Sequence[list[int]],
    new_tokens: int,
    sampling: SamplingParams,
    key_B: jax.Array,
    speculation: SpeculationParams,
) -> float:
    """Returns the tokens per second of causal decoding, on the first batch and a limited number of tokens.

    The batch is as large as the first one of speculative decoding.

    Args:
      run: the run.
      prompts: token ids, `<s>` first.
      new_tokens: maximum number of tokens to add to each prompt, which determines the size of the cache.
      sampling: sampling parameters.
      key_B: PRNG key of each prompt.
      speculation: parameters of the drafts that causal decoding is compared with.
    """
    longest = max(map(len, prompts)) + new_tokens
    size = next(prompt_batches.batch_slices(len(prompts), longest, speculative.max_rows(speculation))).stop
    throughput = Throughput("causal", run.tokenizer.special.mask)
    states = generate(run, prompts[:size], "causal", new_tokens, sampling, key_B=key_B[:size])
    for state in states:
        throughput.update(state)
        if throughput.new_tokens >= _COMPARED_TOKENS * len(state):
            break
    return throughput.tokens_per_second()
