"""Left-to-right generation with a key-value cache, after a causal or a bidirectional prompt."""

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
from dualsm.generation import batches
from dualsm.generation.sampling_params import SamplingParams, allowed_logits, pick
from dualsm.model.attention import attend
from dualsm.model.transformer import Block, Transformer, bind, rotary_angles
from dualsm.process.errors import UserError

MODES = ("causal", "prefix")


class Cache(NamedTuple):
    """Keys and values of all layers at S positions, [N, B, S, H, K] each."""

    keys: jax.Array
    values: jax.Array


class Decoding(NamedTuple):
    """Where a batch of texts stands.

    Attributes:
      tokens_BxS: prompts and what follows them, filled up with `<pad>`.
      length_B: tokens of each text so far.
      logits_BxV: for the token after the last, float32.
      done_B: whether `</s>` was drawn.
      cache: of all positions before `length_B`.
      key_B: PRNG key of each text; the token at position i is drawn with it and i.
    """

    tokens_BxS: jax.Array
    length_B: jax.Array
    logits_BxV: jax.Array
    done_B: jax.Array
    cache: Cache
    key_B: jax.Array


def extend(
    model: Transformer,
    tokens_BxP: jax.Array,
    position_B: jax.Array,
    prefix_end_B: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Runs the model on P more tokens a row.

    Args:
      model: the model.
      tokens_BxP: the tokens at positions `position_B`, `position_B + 1`, ...
      position_B: how many positions of the cache each row has filled.
      prefix_end_B: positions before it are seen from everywhere before it; 0: causal.
      cache: is written at the new positions.

    Returns:
      features_BxPxD, and the cache.
    """
    rows, size = tokens_BxP.shape
    positions_BxP = position_B[:, None] + jnp.arange(size)
    key_end_BxP = jnp.maximum(positions_BxP + 1, prefix_end_B[:, None])
    angles = rotary_angles(positions_BxP, model.head_dim, model.theta)
    row_Bx1 = jnp.arange(rows)[:, None]

    def layer(block: Block, keys_BxSxHxK, values_BxSxHxK, x_TxD):
        q, k, v = block.attention.project(x_TxD, rows, angles)
        keys_BxSxHxK = keys_BxSxHxK.at[row_Bx1, positions_BxP].set(k, mode="drop")
        values_BxSxHxK = values_BxSxHxK.at[row_Bx1, positions_BxP].set(v, mode="drop")
        attended = attend(q, keys_BxSxHxK, values_BxSxHxK, jnp.zeros_like(key_end_BxP), key_end_BxP)
        x_TxD = x_TxD + block.attention.merge(attended)
        return x_TxD + block.mlp(x_TxD), keys_BxSxHxK, values_BxSxHxK

    scan = nnx.scan(layer, in_axes=(0, 0, 0, nnx.Carry), out_axes=(nnx.Carry, 0, 0))
    x_TxD = model.embedding(tokens_BxP.reshape(-1))
    x_TxD, keys, values = scan(model.blocks, cache.keys, cache.values, x_TxD)
    return model.head.features(x_TxD).reshape(rows, size, -1), Cache(keys, values)


def empty_cache(model: Transformer, rows: int, size: int) -> Cache:
    """A cache for `rows` texts of at most `size` tokens."""
    kernel = model.blocks.attention.key.kernel
    layers, _, width = kernel.shape
    shape = (layers, rows, size, width // model.head_dim, model.head_dim)
    return Cache(*jnp.zeros((2, *shape), model.embedding.dtype or kernel.dtype))


@functools.partial(jax.jit, static_argnames=("config", "size", "bidirectional", "special"))
def begin(
    config: FrozenConfigDict,
    params: dict,
    prompts_BxP: jax.Array,
    length_B: jax.Array,
    key_B: jax.Array,
    *,
    size: int,
    bidirectional: bool,
    special: SpecialIds,
) -> Decoding:
    """Reads the prompts.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      prompts_BxP: prompts, filled up at the right with `<pad>`.
      length_B: tokens of each prompt, at least 1.
      key_B: PRNG key of each text.
      size: S, most tokens of a text, prompt included.
      bidirectional: whether a prompt's tokens see all of the prompt.
      special: the tokenizer's special ids.
    """
    model = bind(config, params)
    rows, prompt = prompts_BxP.shape
    prefix_end_B = length_B if bidirectional else jnp.zeros_like(length_B)
    # Filled-up positions write into the cache too, but are overwritten before anything looks at them.
    features_BxPxD, cache = extend(
        model, prompts_BxP, jnp.zeros_like(length_B), prefix_end_B, empty_cache(model, rows, size)
    )
    last_BxD = jnp.take_along_axis(features_BxPxD, length_B[:, None, None] - 1, axis=1)[:, 0]
    tokens_BxS = jnp.pad(prompts_BxP, [(0, 0), (0, size - prompt)], constant_values=special.pad)
    logits_BxV = model.head.output(last_BxD).astype(jnp.float32)
    return Decoding(tokens_BxS, length_B, logits_BxV, length_B >= size, cache, key_B)


@functools.partial(jax.jit, static_argnames=("config", "steps", "sampling", "special"), donate_argnums=2)
def decode(
    config: FrozenConfigDict,
    params: dict,
    state: Decoding,
    *,
    steps: int,
    sampling: SamplingParams,
    special: SpecialIds,
) -> Decoding:
    """Adds at most `steps` tokens to each text that has not stopped.

    The cost of a token does not depend on how many there are already: the cache has the size of the end.
    """

    def one(state: Decoding) -> Decoding:
        model = bind(config, params)  # here, since NNX modules must not cross into a loop's body
        logits_BxV = allowed_logits(state.logits_BxV, special, may_stop=True)
        key_B = jax.vmap(jax.random.fold_in)(state.key_B, state.length_B)
        token_B = jax.vmap(functools.partial(pick, sampling=sampling))(logits_BxV, key_B)
        token_B = jnp.where(state.done_B, special.pad, token_B)
        rows = jnp.arange(len(token_B))
        place_B = jnp.where(state.done_B, state.tokens_BxS.shape[1], state.length_B)
        tokens_BxS = state.tokens_BxS.at[rows, place_B].set(token_B, mode="drop")
        features_Bx1xD, cache = extend(model, token_B[:, None], place_B, jnp.zeros_like(place_B), state.cache)
        length_B = state.length_B + ~state.done_B
        done_B = state.done_B | (token_B == special.eos) | (length_B >= state.tokens_BxS.shape[1])
        logits_BxV = model.head.output(features_Bx1xD[:, 0]).astype(jnp.float32)
        return Decoding(tokens_BxS, length_B, logits_BxV, done_B, cache, state.key_B)

    def go_on(carry):
        i, state = carry
        return (i < steps) & ~state.done_B.all()

    return jax.lax.while_loop(go_on, lambda carry: (carry[0] + 1, one(carry[1])), (0, state))[1]


def generate(
    config: FrozenConfigDict,
    params: dict,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: SamplingParams,
    special: SpecialIds,
    mode: str = "causal",
    key_B: jax.Array | None = None,
    at_once: int = 8,
) -> Iterator[list[list[int]]]:
    """Generates, and yields the texts' tokens every few steps so that a reader can watch.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      prompts: token ids, `<s>` first; many are generated batch by batch.
      new_tokens: most tokens to add to each.
      sampling: how to draw.
      special: the tokenizer's special ids.
      mode: "causal", or "prefix" for prompts that are read bidirectionally.
      key_B: PRNG key of each prompt; None: those of seed 0, see `batches.prompt_keys`.
      at_once: steps between two yields.

    Yields:
      All texts as they stand, prompts included; last as they end.

    Raises:
      UserError: for an unknown mode or an empty prompt.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is none of {', '.join(MODES)}")
    if not prompts or not all(map(len, prompts)):
        raise UserError("an empty prompt; a prompt holds at least <s>")
    key_B = batches.prompt_keys(0, prompts) if key_B is None else key_B
    texts = [list(prompt) for prompt in prompts]
    for part in batches.split(len(texts), max(map(len, texts)) + new_tokens):
        prompts_BxP, prompt_B = batches.pad(texts[part], special.pad)
        size, bidirectional, most_B = (
            prompts_BxP.shape[1] + new_tokens,
            mode == "prefix",
            prompt_B + new_tokens,
        )
        state = begin(
            config, params, prompts_BxP, prompt_B, key_B[part],
            size=size, bidirectional=bidirectional, special=special,
        )  # fmt: skip
        while True:
            tokens_BxS, length_B, done_B = jax.device_get((state.tokens_BxS, state.length_B, state.done_B))
            length_B = np.minimum(length_B, most_B)
            texts[part] = [row[:length].tolist() for row, length in zip(tokens_BxS, length_B, strict=True)]
            yield list(texts)
            if (done_B | (length_B == most_B)).all():
                break
            state = decode(config, params, state, steps=at_once, sampling=sampling, special=special)
