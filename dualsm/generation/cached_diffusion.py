"""Generation by unmasking blocks from left to right, with a key-value cache of the finished blocks.

Attention is block-causal, as in the objective `block_diffusion` with `form="noisy"`: the blocks of a text
have the same number of positions, and each position attends to the text up to the end of its block. The keys
and values of a finished block therefore never change. A forward pass computes only one block of each text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from dualsm.data.tokenizer import SpecialIds
from dualsm.generation import prompt_batches
from dualsm.generation.autoregressive import Cache, forward_prompt, forward_with_cache
from dualsm.generation.diffusion import (
    UnmaskingParams,
    check_texts,
    choose,
    draw_candidates,
    position_keys,
)
from dualsm.generation.sampling_params import SamplingParams
from dualsm.model.transformer import Transformer, bind
from dualsm.process.errors import UserError


class BlockState(NamedTuple):
    """State of a batch of texts during unmasking.

    Attributes:
      tokens_BxS: token ids with `<mask>` at masked positions, padded with `<pad>`.
      length_B: number of tokens of each text.
      start_B: first position of each text's current block.
      quota_B: remaining forward passes of the current block; 0 before its first one.
      feature_BxD: features at the position before the current block, which predict its first token.
      cache: keys and values of all positions before `start_B`.
      key_B: PRNG key of each text; the key of a position is derived from it, the position and `forwards`.
      forwards: number of forward passes so far, int32 [].
      forwards_B: number of forward passes of each text so far, int32.
    """

    tokens_BxS: jax.Array
    length_B: jax.Array
    start_B: jax.Array
    quota_B: jax.Array
    feature_BxD: jax.Array
    cache: Cache
    key_B: jax.Array
    forwards: jax.Array
    forwards_B: jax.Array


@dataclasses.dataclass
class ForwardCounts:
    """Number of forward passes, summed over texts."""

    forwards: int = 0


@functools.partial(jax.jit, static_argnames=("config", "prefix", "block", "special"))
def start(
    config: FrozenConfigDict,
    params: dict,
    tokens_BxS: jax.Array,
    length_B: jax.Array,
    key_B: jax.Array,
    *,
    prefix: int,
    block: int,
    special: SpecialIds,
) -> BlockState:
    """Returns the state before the first forward pass, with the blocks before the first mask in the cache.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      tokens_BxS: texts with masks, padded with `<pad>`.
      length_B: number of tokens of each text.
      key_B: PRNG key of each text.
      prefix: number of positions to store, at least 1; the blocks before the first mask of each text.
      block: positions per block.
      special: the tokenizer's special ids.
    """
    model = bind(config, params)
    size = tokens_BxS.shape[1]
    start_B = jnp.argmax(tokens_BxS == special.mask, axis=1) // block * block
    ends_P = (jnp.arange(prefix) // block + 1) * block
    # Stores masked blocks too; unmasking overwrites them before any other block attends to them.
    ends_BxP = jnp.minimum(ends_P, length_B[:, None])
    features_BxPxD, cache = forward_prompt(model, tokens_BxS[:, :prefix], ends_BxP, size)
    before_B = jnp.maximum(start_B - 1, 0)
    feature_BxD = jnp.take_along_axis(features_BxPxD, before_B[:, None, None], axis=1)[:, 0]
    zeros_B = jnp.zeros_like(start_B)
    return BlockState(
        tokens_BxS, length_B, start_B, zeros_B, feature_BxD, cache, key_B, jnp.int32(0), zeros_B
    )


class BlockPass(NamedTuple):
    """Results of a forward pass on the current block of each text, P = block positions.

    Attributes:
      position_BxP: positions of the block.
      features_BxPxD: features that predict the tokens of the block.
      last_BxD: features at the last position of the block, which predict the first token of the next block.
      masked_BxP: True at masked positions.
      cache: the cache with the block, in its current form.
    """

    position_BxP: jax.Array
    features_BxPxD: jax.Array
    last_BxD: jax.Array
    masked_BxP: jax.Array
    cache: Cache


def forward_block(model: Transformer, state: BlockState, block: int, mask: int) -> BlockPass:
    """Runs the model on the current block of each text that has masks left."""
    size = state.tokens_BxS.shape[1]
    position_BxP = state.start_B[:, None] + jnp.arange(block)
    tokens_BxP = jnp.take_along_axis(state.tokens_BxS, jnp.minimum(position_BxP, size - 1), axis=1)
    is_inside_BxP = position_BxP < state.length_B[:, None]
    # Nothing is stored for finished texts.
    stored_B = jnp.where((state.tokens_BxS == mask).any(1), state.start_B, size)
    end_B = jnp.minimum(state.start_B + block, state.length_B)
    end_BxP = jnp.broadcast_to(end_B[:, None], position_BxP.shape)
    features_BxPxD, cache = forward_with_cache(model, tokens_BxP, stored_B, end_BxP, state.cache)
    shifted_BxPxD = jnp.concatenate([state.feature_BxD[:, None], features_BxPxD[:, :-1]], axis=1)
    masked_BxP = (tokens_BxP == mask) & is_inside_BxP
    return BlockPass(position_BxP, shifted_BxPxD, features_BxPxD[:, -1], masked_BxP, cache)


@functools.partial(
    jax.jit,
    static_argnames=("config", "sampling", "unmasking", "special"),
    donate_argnames="state",
)
def unmask_blocks(
    config: FrozenConfigDict,
    params: dict,
    state: BlockState,
    steps: jax.Array,
    *,
    sampling: SamplingParams,
    unmasking: UnmaskingParams,
    special: SpecialIds,
) -> BlockState:
    """Runs up to `steps` forward passes for each text that has masks left; 0 only compiles.

    A pass on a block with masks unmasks at least one of them. After the last one, another pass stores the
    keys and values of the unmasked block, and the text moves on to its next block.
    """

    def step(state: BlockState) -> BlockState:
        model = bind(config, params)  # NNX modules cannot be captured by the body of a loop
        rows_Bx1, size = jnp.arange(len(state.start_B))[:, None], state.tokens_BxS.shape[1]
        is_active_B = (state.tokens_BxS == special.mask).any(1)
        done = forward_block(model, state, unmasking.block, special.mask)
        key_BxP = position_keys(state.key_B, done.position_BxP, state.forwards)
        candidates = draw_candidates(
            config, params, done.features_BxPxD, key_BxP, sampling, unmasking, special
        )
        masks_B = done.masked_BxP.sum(1)
        first_quota_B = jnp.minimum(unmasking.steps or masks_B, masks_B)
        quota_B = jnp.where(state.quota_B > 0, state.quota_B, first_quota_B)
        chosen_BxP = choose(candidates, done.masked_BxP, quota_B, unmasking)
        position_BxP = jnp.where(chosen_BxP, done.position_BxP, size)
        is_stored_B = is_active_B & (masks_B == 0)
        return BlockState(
            tokens_BxS=state.tokens_BxS.at[rows_Bx1, position_BxP].set(candidates.token_BxL, mode="drop"),
            length_B=state.length_B,
            start_B=state.start_B + unmasking.block * is_stored_B,
            quota_B=jnp.where(masks_B > 0, quota_B - 1, 0),
            feature_BxD=jnp.where(is_stored_B[:, None], done.last_BxD, state.feature_BxD),
            cache=done.cache,
            key_B=state.key_B,
            forwards=state.forwards + 1,
            forwards_B=state.forwards_B + is_active_B,
        )

    def unfinished(carry):
        i, state = carry
        return (i < steps) & (state.tokens_BxS == special.mask).any()

    return jax.lax.while_loop(unfinished, lambda carry: (carry[0] + 1, step(carry[1])), (0, state))[1]


def infill_blocks(
    config: FrozenConfigDict,
    params: dict,
    texts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    unmasking: UnmaskingParams,
    special: SpecialIds,
    key_B: jax.Array | None = None,
    counts: ForwardCounts | None = None,
    yield_every: int = 8,
) -> Iterator[list[list[int]]]:
    """Fills in the masked positions of texts block by block, and yields the intermediate texts.

    Blocks are counted from the first token of a text. Tokens after a block have no effect on it.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      texts: token ids, `<s>` first, with `<mask>` at the positions to fill in; divided into batches.
      sampling: sampling parameters.
      unmasking: unmasking parameters; `block` must not be 0.
      special: the tokenizer's special ids.
      key_B: PRNG key of each text; None: keys of seed 0, see `prompt_batches.prompt_keys`.
      counts: updated with the number of forward passes; None: not counted.
      yield_every: number of forward passes between two yields.

    Yields:
      Token ids of all texts. The last item contains the texts without masks.

    Raises:
      UserError: if there are no blocks, or if a text is empty or starts with a mask.
    """
    if not unmasking.block:
        raise UserError("block=0: the cache needs blocks; set the number of positions per block, such as 32")
    check_texts(texts, special)
    key_B = prompt_batches.prompt_keys(0, texts) if key_B is None else key_B
    texts = [list(text) for text in texts]
    for part in prompt_batches.batch_slices(len(texts), max(map(len, texts))):
        tokens_BxS, length_B = prompt_batches.pad_batch(texts[part], special.pad)
        # Blocks longer than the texts would only cost time.
        fitting = dataclasses.replace(unmasking, block=min(unmasking.block, tokens_BxS.shape[1]))
        state = start(
            config, params, tokens_BxS, length_B, key_B[part],
            prefix=_prefix(tokens_BxS == special.mask, fitting.block), block=fitting.block, special=special,
        )  # fmt: skip
        state = prompt_batches.put_beside_params(params, state)
        advance = functools.partial(
            unmask_blocks, config, params, sampling=sampling, unmasking=fitting, special=special
        )
        state = jax.block_until_ready(advance(state, steps=0))  # compiles before the first yield
        counted = 0
        while True:
            tokens_BxS, forwards_B = jax.device_get((state.tokens_BxS, state.forwards_B))
            texts[part] = [row[:length].tolist() for row, length in zip(tokens_BxS, length_B, strict=True)]
            if counts is not None:
                counts.forwards += int(forwards_B.sum()) - counted
                counted = int(forwards_B.sum())
            yield list(texts)
            if not (tokens_BxS == special.mask).any():
                break
            state = advance(state, steps=yield_every)


def _prefix(masked_BxS: np.ndarray, block: int) -> int:
    """Returns the number of positions to store before the first forward pass.

    They contain all blocks before the first mask of each text. The result takes few values, as in
    `prompt_batches.pad_batch`.
    """
    needed = int((np.argmax(masked_BxS, axis=1) // block * block).max())
    return min(prompt_batches.padded_length(max(needed, 1)), masked_BxS.shape[1])
