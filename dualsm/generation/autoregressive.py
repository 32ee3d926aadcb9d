"""Autoregressive generation with a key-value cache, after a causal or a bidirectional prompt."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import FrozenConfigDict

from dualsm.data.tokenizer import SpecialIds
from dualsm.generation import prompt_batches
from dualsm.generation.cached_attention import attend_with_cache
from dualsm.generation.sampling_params import SamplingParams, mask_reserved_ids, sample
from dualsm.model.attention import attend
from dualsm.model.rope import layer_angles
from dualsm.model.transformer import Block, Transformer, bind
from dualsm.process.errors import UserError

MODES = ("causal", "prefix")


class Cache(NamedTuple):
    """Keys and values of all layers, [N, B, Z, S, K] each; N layers, Z key and value heads, S positions."""

    keys: jax.Array
    values: jax.Array


class DecodeState(NamedTuple):
    """State of a batch of texts during decoding.

    Attributes:
      tokens_BxS: prompts and generated tokens, padded with `<pad>`.
      length_B: current number of tokens of each text.
      logits_BxV: logits for the next token, float32.
      done_B: True if the text is finished: `</s>` was sampled, or S tokens are reached.
      cache: keys and values of all positions before `length_B`.
      key_B: PRNG key of each text; the key for position i is `fold_in(key, i)`.
    """

    tokens_BxS: jax.Array
    length_B: jax.Array
    logits_BxV: jax.Array
    done_B: jax.Array
    cache: Cache
    key_B: jax.Array


def forward_prompt(
    model: Transformer, tokens_BxP: jax.Array, key_end_BxP: jax.Array | None, size: int
) -> tuple[jax.Array, Cache]:
    """Runs the model on the first P tokens of each text.

    Args:
      model: the model.
      tokens_BxP: tokens at positions 0 to P - 1.
      key_end_BxP: position after the last key that each token attends to; None: causal attention.
      size: S, the size of the cache, at least P.

    Returns:
      features_BxPxD, and a cache with the first P positions filled.
    """
    rows, prompt = tokens_BxP.shape
    key_start_BxP = jnp.zeros_like(tokens_BxP)
    key_end_BxP = key_start_BxP + jnp.arange(1, prompt + 1) if key_end_BxP is None else key_end_BxP
    angles = model.rope.angles(jnp.arange(prompt))

    def layer(block: Block, is_rotated, x_TxD):
        q, k, v = block.attention.project(x_TxD, rows, layer_angles(angles, is_rotated))
        attended = attend(q, k, v, key_start_BxP, key_end_BxP)
        x_TxD = x_TxD + block.attention.merge(attended)
        return x_TxD + block.mlp(x_TxD), k.swapaxes(1, 2), v.swapaxes(1, 2)

    scan = nnx.scan(layer, in_axes=(0, 0, nnx.Carry), out_axes=(nnx.Carry, 0, 0))
    x_TxD, *filled = scan(model.blocks, model.rotated_N, model.embedding(tokens_BxP.reshape(-1)))
    padding = [(0, 0), (0, 0), (0, 0), (0, size - prompt), (0, 0)]
    cache = Cache(*(jnp.pad(x_NxBxZxPxK, padding) for x_NxBxZxPxK in filled))
    return model.head.features(x_TxD).reshape(rows, prompt, -1), cache


def forward_with_cache(
    model: Transformer,
    tokens_BxP: jax.Array,
    position_B: jax.Array,
    key_end_BxP: jax.Array | None,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Runs the model on P tokens of each text, whose keys and values replace those in the cache.

    Args:
      model: the model.
      tokens_BxP: tokens at positions `position_B`, `position_B + 1`, ...
      position_B: position of the first token of each text; nothing is stored beyond the end of the cache.
      key_end_BxP: position after the last key that each token attends to; None: causal attention.
      cache: the cache before the call.

    Returns:
      features_BxPxD, and the cache with the new positions filled.
    """
    rows, size = tokens_BxP.shape
    positions_BxP = position_B[:, None] + jnp.arange(size)
    key_end_BxP = positions_BxP + 1 if key_end_BxP is None else key_end_BxP
    angles = model.rope.angles(positions_BxP)

    def layer(block: Block, is_rotated, keys_BxZxSxK, values_BxZxSxK, x_TxD):
        q, k, v = block.attention.project(x_TxD, rows, layer_angles(angles, is_rotated))
        attended = attend_with_cache(q, k, v, keys_BxZxSxK, values_BxZxSxK, position_B, key_end_BxP)
        x_TxD = x_TxD + block.attention.merge(attended)
        return x_TxD + block.mlp(x_TxD), k, v

    scan = nnx.scan(layer, in_axes=(0, 0, 0, 0, nnx.Carry), out_axes=(nnx.Carry, 0, 0))
    x_TxD = model.embedding(tokens_BxP.reshape(-1))
    x_TxD, *new = scan(model.blocks, model.rotated_N, cache.keys, cache.values, x_TxD)
    row_Bx1 = jnp.arange(rows)[:, None]

    def stored(cached_NxBxZxSxK, new_NxBxPxZxK):
        new_BxPxNxZxK = new_NxBxPxZxK.transpose(1, 2, 0, 3, 4)
        return cached_NxBxZxSxK.at[:, row_Bx1, :, positions_BxP].set(new_BxPxNxZxK, mode="drop")

    return model.head.features(x_TxD).reshape(rows, size, -1), Cache(*map(stored, cache, new))


@functools.partial(jax.jit, static_argnames=("config", "size", "bidirectional", "special"))
def prefill(
    config: FrozenConfigDict,
    params: dict,
    prompts_BxP: jax.Array,
    length_B: jax.Array,
    key_B: jax.Array,
    *,
    size: int,
    bidirectional: bool,
    special: SpecialIds,
) -> DecodeState:
    """Fills the cache with the prompts.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      prompts_BxP: prompts, padded with `<pad>` on the right.
      length_B: number of tokens of each prompt, at least 1.
      key_B: PRNG key of each text.
      size: S, the maximum number of tokens of a text, prompt included.
      bidirectional: if True, attention within a prompt is bidirectional.
      special: the tokenizer's special ids.

    Returns:
      The state before the first generated token.
    """
    model = bind(config, params)
    prompt = prompts_BxP.shape[1]
    key_end_BxP = jnp.maximum(jnp.arange(1, prompt + 1), length_B[:, None]) if bidirectional else None
    # Padding also writes to the cache; generated tokens overwrite it before any query can attend to it.
    features_BxPxD, cache = forward_prompt(model, prompts_BxP, key_end_BxP, size)
    last_BxD = jnp.take_along_axis(features_BxPxD, length_B[:, None, None] - 1, axis=1)[:, 0]
    tokens_BxS = jnp.pad(prompts_BxP, [(0, 0), (0, size - prompt)], constant_values=special.pad)
    logits_BxV = model.output_logits(last_BxD)
    return DecodeState(tokens_BxS, length_B, logits_BxV, length_B >= size, cache, key_B)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "special"), donate_argnums=2)
def decode(
    config: FrozenConfigDict,
    params: dict,
    state: DecodeState,
    *,
    steps: jax.Array | int,
    sampling: SamplingParams,
    special: SpecialIds,
) -> DecodeState:
    """Generates up to `steps` more tokens of each text that is not finished; 0 only compiles.

    The cache has its final size from the start, so every token costs the same.
    """

    def step(state: DecodeState) -> DecodeState:
        model = bind(config, params)  # NNX modules cannot be captured by the body of a loop
        logits_BxV = mask_reserved_ids(state.logits_BxV, special, allow_eos=True)
        key_B = jax.vmap(jax.random.fold_in)(state.key_B, state.length_B)
        token_B = jax.vmap(functools.partial(sample, sampling=sampling))(logits_BxV, key_B)
        token_B = jnp.where(state.done_B, special.pad, token_B)
        rows = jnp.arange(len(token_B))
        position_B = jnp.where(state.done_B, state.tokens_BxS.shape[1], state.length_B)
        tokens_BxS = state.tokens_BxS.at[rows, position_B].set(token_B, mode="drop")
        features_Bx1xD, cache = forward_with_cache(model, token_B[:, None], position_B, None, state.cache)
        length_B = state.length_B + ~state.done_B
        done_B = state.done_B | (token_B == special.eos) | (length_B >= state.tokens_BxS.shape[1])
        logits_BxV = model.output_logits(features_Bx1xD[:, 0])
        return DecodeState(tokens_BxS, length_B, logits_BxV, done_B, cache, state.key_B)

    def unfinished(carry):
        i, state = carry
        return (i < steps) & ~state.done_B.all()

    return jax.lax.while_loop(unfinished, lambda carry: (carry[0] + 1, step(carry[1])), (0, state))[1]


def generate(
    config: FrozenConfigDict,
    params: dict,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: SamplingParams,
    special: SpecialIds,
    mode: str = "causal",
    key_B: jax.Array | None = None,
    yield_every: int = 8,
) -> Iterator[list[list[int]]]:
    """Generates texts, and yields their intermediate states.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      prompts: token ids, `<s>` first; divided into batches.
      new_tokens: maximum number of tokens to add to each prompt.
      sampling: sampling parameters.
      special: the tokenizer's special ids.
      mode: "causal", or "prefix" for bidirectional attention within the prompt.
      key_B: PRNG key of each prompt; None: keys of seed 0, see `prompt_batches.prompt_keys`.
      yield_every: number of steps between two yields.

    Yields:
      Token ids of all texts, prompts included. The last item contains the finished texts.

    Raises:
      UserError: if the mode is unknown or a prompt is empty.
    """
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}; choose from {', '.join(MODES)}")
    check_prompts(prompts)
    key_B = prompt_batches.prompt_keys(0, prompts) if key_B is None else key_B
    texts = [list(prompt) for prompt in prompts]
    for part in prompt_batches.batch_slices(len(texts), max(map(len, texts)) + new_tokens):
        prompts_BxP, prompt_B = prompt_batches.pad_batch(texts[part], special.pad)
        max_length_B = prompt_B + new_tokens
        state = prefill(
            config, params, prompts_BxP, prompt_B, key_B[part],
            size=prompts_BxP.shape[1] + new_tokens, bidirectional=mode == "prefix", special=special,
        )  # fmt: skip
        advance = functools.partial(decode, config, params, sampling=sampling, special=special)
        state = jax.block_until_ready(advance(state, steps=0))  # compiles before the first yield
        while True:
            tokens_BxS, length_B, done_B = jax.device_get((state.tokens_BxS, state.length_B, state.done_B))
            length_B = np.minimum(length_B, max_length_B)
            texts[part] = [row[:length].tolist() for row, length in zip(tokens_BxS, length_B, strict=True)]
            yield list(texts)
            if (done_B | (length_B == max_length_B)).all():
                break
            state = advance(state, steps=yield_every)


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Checks that there are prompts and that none is empty. Raises `UserError` otherwise."""
    if not prompts or not all(map(len, prompts)):
        raise UserError("empty prompt: 0 tokens; start each prompt with <s>")
