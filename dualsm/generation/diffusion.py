"""Generation by iterative unmasking: the masked places of a text are filled in over several forwards.

Every forward sees the whole text, masks included, and the logits at position i - 1 predict the token at
position i. Which places are settled first is decided by how sure the model is of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from dualsm.data.tokenizer import SpecialIds
from dualsm.generation import batches
from dualsm.generation.sampling_params import SamplingParams, allowed_logits, pick
from dualsm.model.transformer import bind
from dualsm.process.errors import UserError

ORDERS = ("confidence", "margin", "entropy", "random")
_LOGITS_AT_ONCE = 256  # positions whose logits are held at once


@dataclasses.dataclass(frozen=True)
class Unmasking:
    """How masked places are settled.

    Attributes:
      order: which go first: "confidence" (of the token drawn), "margin" (between the two likeliest),
        "entropy" (the lowest), or "random".
      steps: forwards for each block; 0: one a masked token.
      threshold: instead of a fixed number of forwards, settle all tokens of a probability of at least
        this (always at least one); 0: off.
      block: settle this many masked places before going on to the next, left to right; 0: all at once.
    """

    order: str = "confidence"
    steps: int = 0
    threshold: float = 0.0
    block: int = 0

    def __post_init__(self):
        if self.order not in ORDERS:
            raise UserError(f"order {self.order!r} is none of {', '.join(ORDERS)}")
        if self.steps < 0 or self.block < 0 or not 0 <= self.threshold <= 1:
            raise UserError(
                f"steps={self.steps} and block={self.block} must not be negative, "
                f"threshold={self.threshold} must lie in [0, 1]"
            )


class DiffusionState(NamedTuple):
    """Where a batch of texts stands.

    Attributes:
      tokens_BxL: texts with `<mask>` where nothing is settled yet, filled up with `<pad>`.
      length_B: tokens of each text.
      block_BxL: number of the block each masked place belongs to, -1 for fixed tokens.
      quota_BxL: forwards that the block of each place may take.
      key_B: PRNG key of each text; the draws at a place follow from it, the place and `forwards`.
      forwards: how many there were, int32 [].
    """

    tokens_BxL: jax.Array
    length_B: jax.Array
    block_BxL: jax.Array
    quota_BxL: jax.Array
    key_B: jax.Array
    forwards: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "sampling", "unmasking", "special"))
def settle(
    config: FrozenConfigDict,
    params: dict,
    state: DiffusionState,
    *,
    sampling: SamplingParams,
    unmasking: Unmasking,
    special: SpecialIds,
) -> DiffusionState:
    """One forward, and the places it settles: at least one in every text that has masks left."""
    start_BxL = jnp.zeros_like(state.tokens_BxL)
    features_BxLxD = bind(config, params).features(
        state.tokens_BxL, start_BxL, start_BxL + state.length_B[:, None]
    )

    def draw(feature_D, key):
        """The token for a place, its probability, and how early it should be settled."""
        logits_V = bind(config, params).head.output(feature_D).astype(jnp.float32)
        logits_V = allowed_logits(logits_V, special, may_stop=False)
        draw_key, order_key = jax.random.split(key)
        token, log_p_V = pick(logits_V, draw_key, sampling), jax.nn.log_softmax(logits_V)
        return token, jnp.exp(log_p_V[token]), _sureness(log_p_V, token, unmasking.order, order_key)

    # Position i - 1 predicts the token at position i; what is drawn for position 0 is used nowhere.
    features_TxD = jnp.roll(features_BxLxD, 1, axis=1).reshape(-1, features_BxLxD.shape[-1])
    key_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.forwards)
    key_BxL = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
        key_B, jnp.arange(state.tokens_BxL.shape[1])
    )
    drawn = jax.lax.map(
        lambda place: draw(*place), (features_TxD, key_BxL.reshape(-1)), batch_size=_LOGITS_AT_ONCE
    )
    token_BxL, probability_BxL, sureness_BxL = (x.reshape(state.tokens_BxL.shape) for x in drawn)

    masked_BxL = state.tokens_BxL == special.mask
    blocks_BxL = jnp.where(masked_BxL, state.block_BxL, jnp.iinfo(jnp.int32).max)
    open_BxL = masked_BxL & (state.block_BxL == blocks_BxL.min(1, keepdims=True))
    sureness_BxL = jnp.where(open_BxL, sureness_BxL, -jnp.inf)
    rank_BxL = jnp.argsort(jnp.argsort(-sureness_BxL, axis=1), axis=1)
    left_B = open_BxL.sum(1)
    if unmasking.threshold:
        chosen_BxL = open_BxL & ((probability_BxL >= unmasking.threshold) | (rank_BxL == 0))
    else:
        forwards_B = jnp.where(open_BxL, state.quota_BxL, 0).max(1)
        count_B = -(-left_B // jnp.maximum(forwards_B, 1))
        chosen_BxL = open_BxL & (rank_BxL < count_B[:, None])
    return state._replace(
        tokens_BxL=jnp.where(chosen_BxL, token_BxL, state.tokens_BxL),
        quota_BxL=state.quota_BxL - open_BxL,
        forwards=state.forwards + 1,
    )


def _sureness(log_p_V: jax.Array, token: jax.Array, order: str, key: jax.Array) -> jax.Array:
    """How early a place should be settled, []."""
    if order == "random":
        return jax.random.uniform(key)
    if order == "entropy":
        p_V = jnp.exp(log_p_V)
        return jnp.where(p_V > 0, p_V * log_p_V, 0.0).sum()
    if order == "margin":
        first, second = jnp.exp(jax.lax.top_k(log_p_V, 2)[0])
        return first - second
    return log_p_V[token]


def fill(
    config: FrozenConfigDict,
    params: dict,
    texts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    unmasking: Unmasking,
    special: SpecialIds,
    key_B: jax.Array | None = None,
) -> Iterator[list[list[int]]]:
    """Fills in the masked places, and yields the texts after every forward so that a reader can watch.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      texts: token ids, `<s>` first, `<mask>` where a token is wanted; all others stay as they are. Many are
        filled in batch by batch.
      sampling: how tokens are drawn.
      unmasking: which places are settled when.
      special: the tokenizer's special ids.
      key_B: PRNG key of each text; None: those of seed 0, see `batches.prompt_keys`.

    Yields:
      All texts as they stand; last without masks.

    Raises:
      UserError: when a text starts with a mask, which no position predicts.
    """
    if any(not text or text[0] == special.mask for text in texts):
        raise UserError("a text to fill in must start with a token that is given, such as <s>")
    key_B = batches.prompt_keys(0, texts) if key_B is None else key_B
    texts = [list(text) for text in texts]
    for part in batches.split(len(texts), max(map(len, texts))):
        tokens_BxL, length_B = batches.pad(texts[part], special.pad)
        plan = _plan(tokens_BxL == special.mask, unmasking)
        state = _beside(params, DiffusionState(tokens_BxL, length_B, *plan, key_B[part], np.int32(0)))
        while True:
            tokens_BxL = np.asarray(state.tokens_BxL)
            texts[part] = [row[:length].tolist() for row, length in zip(tokens_BxL, length_B, strict=True)]
            yield list(texts)
            if not (tokens_BxL == special.mask).any():
                break
            state = settle(config, params, state, sampling=sampling, unmasking=unmasking, special=special)


def _beside(params: dict, state: DiffusionState) -> DiffusionState:
    """On the devices of the parameters, where `settle` leaves it too; else its second call compiles anew."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(state, sharding)


def _plan(masked_BxL: np.ndarray, unmasking: Unmasking) -> tuple[np.ndarray, np.ndarray]:
    """Block number and number of forwards for each masked place, int32 [B, L] (see `DiffusionState`)."""
    place_BxL = np.cumsum(masked_BxL, axis=1) - 1
    size = unmasking.block or masked_BxL.shape[1]
    block_BxL = np.where(masked_BxL, place_BxL // size, -1)
    quota_BxL = np.zeros_like(block_BxL)
    for row, blocks in enumerate(block_BxL):
        for number in range(blocks.max(initial=-1) + 1):
            places = blocks == number
            quota_BxL[row, places] = min(unmasking.steps or places.sum(), places.sum())
    return block_BxL.astype(np.int32), quota_BxL.astype(np.int32)
