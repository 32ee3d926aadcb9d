"""Self-speculative decoding: the model drafts with masks and verifies with its causal mode.

Texts follow the distribution of causal decoding; greedy texts equal causally decoded ones. Each step runs two
forward passes and adds at least two tokens, see `drafting`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from dualsm.data.tokenizer import SpecialIds
from dualsm.generation import drafting, prompt_batches
from dualsm.generation.autoregressive import Cache, check_prompts, prefill
from dualsm.generation.draft_counts import DraftArrays, DraftCounts, DraftRecord
from dualsm.generation.draft_sizes import ADAPTIVE_SIZES, draft_sizes
from dualsm.generation.sampling_params import SamplingParams
from dualsm.model.transformer import bind
from dualsm.process.errors import UserError

MAX_DRAFT = 64
_MAX_POSITIONS = 1024  # per batch, over all drafts; their distributions are in memory at the same time
_MEMORY = 0.95  # decay factor per step of a text's earlier counts
_DRAW, _ACCEPT, _NEXT = range(3)  # uses of the PRNG key of a position


@dataclasses.dataclass(frozen=True)
class SpeculationParams:
    """Parameters of self-speculative decoding.

    Attributes:
      draft: K, the number of tokens per draft; 0: adaptive, from the acceptance rate of each text.
    """

    draft: int = 0

    def __post_init__(self):
        if not 0 <= self.draft <= MAX_DRAFT:
            raise UserError(f"draft={self.draft} must be in [0, {MAX_DRAFT}]; 0 means adaptive")


class SpeculativeState(NamedTuple):
    """State of a batch of texts during decoding.

    Attributes:
      tokens_BxS: prompts and generated tokens, padded with `<pad>`.
      length_B: current number of tokens of each text.
      done_B: True if the text is finished: `</s>` was sampled, or the maximum length is reached.
      cache: causal keys and values of all positions before `length_B - 1`.
      key_B: PRNG key of each text; a position has one key per use, see `drafting.position_keys`.
      drafts_B: number of drafts of each text so far, int32.
      accepted_B: number of drafted tokens that each text has kept, int32.
      rate_Bx2: decayed counts of accepted and of tested tokens that masks predicted, float32.
    """

    tokens_BxS: jax.Array
    length_B: jax.Array
    done_B: jax.Array
    cache: Cache
    key_B: jax.Array
    drafts_B: jax.Array
    accepted_B: jax.Array
    rate_Bx2: jax.Array


_STATIC = ("config", "size", "sampling", "special")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def speculate(
    config: FrozenConfigDict,
    params: dict,
    state: SpeculativeState,
    draft_B: jax.Array,
    max_length_B: jax.Array,
    steps: jax.Array,
    *,
    size: int,
    sampling: SamplingParams,
    special: SpecialIds,
) -> SpeculativeState:
    """Drafts and verifies up to `steps` times for each text that is not finished.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      state: the state before the call.
      draft_B: number of tokens per draft of each text, at most `size`. The tokens of a text depend on it, not
        on `size`.
      max_length_B: maximum number of tokens of each text.
      steps: maximum number of drafts; 0 only compiles.
      size: number of drafted positions that are computed.
      sampling: sampling parameters.
      special: the tokenizer's special ids.
    """
    step = _step_function(config, params, draft_B, max_length_B, size, sampling, special)

    def unfinished(carry):
        i, state = carry
        return (i < steps) & ~state.done_B.all()

    return jax.lax.while_loop(unfinished, lambda carry: (carry[0] + 1, step(carry[1])[0]), (0, state))[1]


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def speculate_once(
    config: FrozenConfigDict,
    params: dict,
    state: SpeculativeState,
    draft_B: jax.Array,
    max_length_B: jax.Array,
    *,
    size: int,
    sampling: SamplingParams,
    special: SpecialIds,
) -> tuple[SpeculativeState, DraftArrays]:
    """Does one step of `speculate`, which has the same arguments, and also returns the drafts."""
    return _step_function(config, params, draft_B, max_length_B, size, sampling, special)(state)


def _step_function(
    config, params, draft_B, max_length_B, size, sampling, special
) -> Callable[[SpeculativeState], tuple[SpeculativeState, DraftArrays]]:
    """Returns the function that drafts and verifies once; the arguments are those of `speculate`."""
    offset_P1 = jnp.arange(size + 1)

    def step(state: SpeculativeState) -> tuple[SpeculativeState, DraftArrays]:
        model = bind(config, params)  # NNX modules cannot be captured by the body of a loop
        rows, end = jnp.arange(len(draft_B)), state.tokens_BxS.shape[1]
        length_B, active_B = state.length_B, ~state.done_B
        size_B = jnp.clip(draft_B, 1, jnp.maximum(max_length_B - length_B, 1))
        last_B = state.tokens_BxS[rows, length_B - 1]
        stored_B = jnp.where(active_B, length_B, end + 1)
        positions_BxP1 = length_B[:, None] + offset_P1
        draw_BxP1, accept_BxP1, next_BxP1 = (
            drafting.position_keys(state.key_B, positions_BxP1, use) for use in (_DRAW, _ACCEPT, _NEXT)
        )
        features_BxPxD, cache = drafting.draft_features(
            model, last_B, stored_B, size_B, state.cache, size=size, mask=special.mask
        )
        log_q_BxPxV = drafting.log_distributions(model, features_BxPxD, sampling, special)
        draft = drafting.draw_draft(log_q_BxPxV, size_B, draw_BxP1[:, :-1], sampling)
        log_p_BxP1xV, cache = drafting.verify(model, draft, stored_B, cache, sampling, special)
        log_acceptance_BxP = drafting.log_acceptance(draft, log_p_BxP1xV)
        uniform_BxP = jax.vmap(jax.vmap(jax.random.uniform))(accept_BxP1[:, :-1])
        # Greedy acceptance has probability 0 or 1.
        log_uniform_BxP = -1.0 if sampling.greedy else jnp.log(uniform_BxP)
        accepted_B = jnp.cumprod(log_uniform_BxP < log_acceptance_BxP, axis=1).sum(1)
        next_key_B = next_BxP1[rows, accepted_B]
        next_B = drafting.draw_next(draft, log_p_BxP1xV, accepted_B, next_key_B, sampling)

        drafted_BxP1 = jnp.pad(draft.tokens_BxP, [(0, 0), (0, 1)])
        new_BxP1 = jnp.where(offset_P1 < accepted_B[:, None], drafted_BxP1, next_B[:, None])
        room_B = max_length_B - length_B
        is_eos_BxP1 = (new_BxP1 == special.eos) & (offset_P1 <= accepted_B[:, None])
        before_eos_B = jnp.where(is_eos_BxP1.any(1), jnp.argmax(is_eos_BxP1, axis=1), size + 1)
        count_B = jnp.where(active_B, jnp.minimum(jnp.minimum(accepted_B, before_eos_B) + 1, room_B), 0)
        position_BxP1 = jnp.where(offset_P1 < count_B[:, None], positions_BxP1, end)
        tested_Bx2 = jnp.stack([accepted_B - 1, accepted_B - 1 + (accepted_B < size_B)], axis=1)
        new_state = SpeculativeState(
            tokens_BxS=state.tokens_BxS.at[rows[:, None], position_BxP1].set(new_BxP1, mode="drop"),
            length_B=length_B + count_B,
            done_B=state.done_B | (before_eos_B < count_B) | (count_B == room_B),
            cache=cache,
            key_B=state.key_B,
            drafts_B=state.drafts_B + active_B,
            accepted_B=state.accepted_B + jnp.minimum(accepted_B, count_B),
            rate_Bx2=_MEMORY * state.rate_Bx2 + tested_Bx2,
        )
        drafted = DraftArrays(
            draft.tokens_BxP, size_B, jnp.minimum(accepted_B, count_B), next_B, count_B > accepted_B, active_B
        )
        return new_state, drafted

    return step


def generate(
    config: FrozenConfigDict,
    params: dict,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: SamplingParams,
    special: SpecialIds,
    speculation: SpeculationParams = SpeculationParams(),
    key_B: jax.Array | None = None,
    counts: DraftCounts | None = None,
    yield_every: int = 8,
) -> Iterator[list[list[int]]]:
    """Generates texts, and yields their intermediate states.

    A text depends on its own prompt, key and `speculation`, not on the other prompts.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      prompts: token ids, `<s>` first; divided into batches.
      new_tokens: maximum number of tokens to add to each prompt.
      sampling: sampling parameters.
      special: the tokenizer's special ids.
      speculation: parameters of the drafts.
      key_B: PRNG key of each prompt; None: keys of seed 0, see `prompt_batches.prompt_keys`.
      counts: updated with the number of drafts and accepted tokens; a `DraftRecord` also with the drafts;
        None: not counted.
      yield_every: number of drafts between yields, and between adaptations of the draft size.

    Yields:
      Token ids of all texts, prompts included. The last item contains the finished texts.

    Raises:
      UserError: if a prompt is empty.
    """
    check_prompts(prompts)
    key_B = prompt_batches.prompt_keys(0, prompts) if key_B is None else key_B
    texts = [list(prompt) for prompt in prompts]
    first = counts.add_texts(len(texts)) if isinstance(counts, DraftRecord) else 0
    for part in prompt_batches.batch_slices(
        len(texts), max(map(len, texts)) + new_tokens, max_rows(speculation)
    ):
        prompts_BxP, prompt_B = prompt_batches.pad_batch(texts[part], special.pad)
        state = start(config, params, prompts_BxP, prompt_B, key_B[part], new_tokens, special)
        counted, compiled = DraftCounts(), set()
        while True:
            tokens_BxS, length_B, done_B, drafts_B, accepted_B, rate_Bx2 = jax.device_get(
                (*state[:3], *state[5:])
            )
            texts[part] = [row[:length].tolist() for row, length in zip(tokens_BxS, length_B, strict=True)]
            if counts is not None:
                counts.drafts += int(drafts_B.sum()) - counted.drafts
                counts.accepted += int(accepted_B.sum()) - counted.accepted
                counted = DraftCounts(int(drafts_B.sum()), int(accepted_B.sum()))
            yield list(texts)
            if done_B.all():
                break
            draft_B, size = draft_sizes(speculation.draft, rate_Bx2, ~done_B)
            function = speculate
            if isinstance(counts, DraftRecord):
                function = functools.partial(_speculate_recorded, counts, first + part.start)
            advance = functools.partial(
                function, config, params, draft_B=draft_B, max_length_B=prompt_B + new_tokens,
                size=size, sampling=sampling, special=special,
            )  # fmt: skip
            if size not in compiled:
                compiled.add(size)
                state = jax.block_until_ready(advance(state=state, steps=0))
                yield list(texts)  # so that a clock can separate compilation from decoding
            state = advance(state=state, steps=yield_every)


def max_rows(speculation: SpeculationParams) -> int:
    """Returns the maximum number of texts per batch."""
    return max(1, _MAX_POSITIONS // ((speculation.draft or ADAPTIVE_SIZES[-1]) + 1))


def start(config, params, prompts_BxP, prompt_B, key_B, new_tokens, special) -> SpeculativeState:
    """Returns the state before the first draft."""
    filled = prefill(
        config, params, prompts_BxP, prompt_B, key_B,
        size=prompts_BxP.shape[1] + new_tokens, bidirectional=False, special=special,
    )  # fmt: skip
    zeros_B = np.zeros(len(prompt_B), np.int32)
    counts = {
        "drafts_B": zeros_B,
        "accepted_B": zeros_B,
        "rate_Bx2": np.zeros((len(prompt_B), 2), np.float32),
    }
    state = SpeculativeState(
        filled.tokens_BxS, filled.length_B, filled.done_B, filled.cache, filled.key_B, **counts
    )
    return prompt_batches.put_beside_params(params, state)


def _speculate_recorded(record: DraftRecord, first: int, *args, state, steps, **options) -> SpeculativeState:
    """Does the same as `speculate`, and adds the drafts to the record of a batch."""
    for _ in range(steps):
        if state.done_B.all():
            break
        state, drafts = speculate_once(*args, state=state, **options)
        record.add_step(first, drafts)
    return state
