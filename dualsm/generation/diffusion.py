"""Generation by iterative unmasking.

The input of every forward pass is the whole text, masks included. The logits at position i - 1 predict the
token at position i. Each pass unmasks the first positions in the chosen order; by default these are the
positions with the highest confidence.
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
from dualsm.generation.sampling_params import SamplingParams, mask_reserved_ids, sample
from dualsm.model.transformer import bind
from dualsm.process.errors import UserError

ORDERS = ("confidence", "margin", "entropy", "random")
_LOGITS_CHUNK = 256  # positions whose logits are in memory at the same time


@dataclasses.dataclass(frozen=True)
class UnmaskingParams:
    """Unmasking parameters.

    Attributes:
      order: positions to unmask first: those with the highest probability of the sampled token
        ("confidence"), the largest difference between the two highest probabilities ("margin"), the lowest
        entropy ("entropy"), or random ones ("random").
      steps: forward passes per block; 0: one per masked token. With a cache one more stores the block.
      threshold: if not 0, replaces the fixed number of passes: each pass unmasks all tokens whose probability
        reaches the threshold, and at least one.
      block: number of masked positions per block, or with a cache of positions from the start of the text;
        blocks are unmasked from left to right; 0: one block.
    """

    order: str = "confidence"
    steps: int = 0
    threshold: float = 0.0
    block: int = 0

    def __post_init__(self):
        if self.order not in ORDERS:
            raise UserError(f"unknown order {self.order!r}; choose from {', '.join(ORDERS)}")
        if self.steps < 0 or self.block < 0 or not 0 <= self.threshold <= 1:
            raise UserError(
                f"steps={self.steps} and block={self.block} must be at least 0, and "
                f"threshold={self.threshold} must be in [0, 1]"
            )


class DiffusionState(NamedTuple):
    """State of a batch of texts during unmasking.

    Attributes:
      tokens_BxL: token ids with `<mask>` at masked positions, padded with `<pad>`.
      length_B: number of tokens of each text.
      block_BxL: block index of each position that was masked at the start, -1 elsewhere.
      quota_BxL: remaining forward passes of each position's block.
      key_B: PRNG key of each text; the key of a position is derived from it, the position and `forwards`.
      forwards: number of forward passes so far, int32 [].
    """

    tokens_BxL: jax.Array
    length_B: jax.Array
    block_BxL: jax.Array
    quota_BxL: jax.Array
    key_B: jax.Array
    forwards: jax.Array


class Candidates(NamedTuple):
    """A sampled token for each position.

    Attributes:
      token_BxL: token ids.
      probability_BxL: probabilities of the tokens, float32.
      priority_BxL: positions with the highest priority are unmasked first, float32.
    """

    token_BxL: jax.Array
    probability_BxL: jax.Array
    priority_BxL: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "sampling", "unmasking", "special"))
def unmask(
    config: FrozenConfigDict,
    params: dict,
    state: DiffusionState,
    *,
    steps: jax.Array | int,
    sampling: SamplingParams,
    unmasking: UnmaskingParams,
    special: SpecialIds,
) -> DiffusionState:
    """Runs `steps` forward passes; 0 only compiles.

    Each pass unmasks at least one position of every text that has masks left.
    """

    def step(_, state: DiffusionState) -> DiffusionState:
        model = bind(config, params)  # NNX modules cannot be captured by the body of a loop
        start_BxL = jnp.zeros_like(state.tokens_BxL)
        end_BxL = start_BxL + state.length_B[:, None]
        features_BxLxD = model.features(state.tokens_BxL, start_BxL, end_BxL)

        # Position i - 1 predicts the token at position i; the token sampled for position 0 is unused.
        features_BxLxD = jnp.roll(features_BxLxD, 1, axis=1)
        position_BxL = jnp.broadcast_to(jnp.arange(state.tokens_BxL.shape[1]), state.tokens_BxL.shape)
        key_BxL = position_keys(state.key_B, position_BxL, state.forwards)
        candidates = draw_candidates(config, params, features_BxLxD, key_BxL, sampling, unmasking, special)

        masked_BxL = state.tokens_BxL == special.mask
        masked_block_BxL = jnp.where(masked_BxL, state.block_BxL, jnp.iinfo(jnp.int32).max)
        active_BxL = masked_BxL & (state.block_BxL == masked_block_BxL.min(1, keepdims=True))
        quota_B = jnp.where(active_BxL, state.quota_BxL, 0).max(1)
        chosen_BxL = choose(candidates, active_BxL, quota_B, unmasking)
        return state._replace(
            tokens_BxL=jnp.where(chosen_BxL, candidates.token_BxL, state.tokens_BxL),
            quota_BxL=state.quota_BxL - active_BxL,
            forwards=state.forwards + 1,
        )

    return jax.lax.fori_loop(0, steps, step, state)


def position_keys(key_B: jax.Array, position_BxL: jax.Array, forwards: jax.Array) -> jax.Array:
    """Returns the keys of positions, [B, L], from the key of each text and the number of forward passes."""
    key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, forwards)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(key_B, position_BxL)


def draw_candidates(
    config: FrozenConfigDict,
    params: dict,
    features_BxLxD: jax.Array,
    key_BxL: jax.Array,
    sampling: SamplingParams,
    unmasking: UnmaskingParams,
    special: SpecialIds,
) -> Candidates:
    """Samples a token for each position.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      features_BxLxD: features that predict the token at each position, not those at the position.
      key_BxL: PRNG key of each position.
      sampling: sampling parameters.
      unmasking: unmasking parameters.
      special: the tokenizer's special ids.
    """

    def draw(feature_D, key):
        logits_V = bind(config, params).output_logits(feature_D)
        logits_V = mask_reserved_ids(logits_V, special, allow_eos=False)
        draw_key, order_key = jax.random.split(key)
        token, log_p_V = sample(logits_V, draw_key, sampling), jax.nn.log_softmax(logits_V)
        return token, jnp.exp(log_p_V[token]), _priority(log_p_V, token, unmasking.order, order_key)

    features_TxD = features_BxLxD.reshape(-1, features_BxLxD.shape[-1])
    drawn = jax.lax.map(
        lambda position: draw(*position), (features_TxD, key_BxL.reshape(-1)), batch_size=_LOGITS_CHUNK
    )
    return Candidates(*(x.reshape(key_BxL.shape) for x in drawn))


def choose(
    candidates: Candidates, active_BxL: jax.Array, quota_B: jax.Array, unmasking: UnmaskingParams
) -> jax.Array:
    """Returns the positions to unmask in a forward pass, bool [B, L], at least one among any active ones.

    Args:
      candidates: from `draw_candidates`.
      active_BxL: masked positions of the current block.
      quota_B: remaining forward passes of the block, this one included.
      unmasking: unmasking parameters.
    """
    priority_BxL = jnp.where(active_BxL, candidates.priority_BxL, -jnp.inf)
    rank_BxL = jnp.argsort(jnp.argsort(-priority_BxL, axis=1), axis=1)
    if unmasking.threshold:
        is_likely_BxL = candidates.probability_BxL >= unmasking.threshold
        return active_BxL & (is_likely_BxL | (rank_BxL == 0))
    count_B = -(-active_BxL.sum(1) // jnp.maximum(quota_B, 1))
    return active_BxL & (rank_BxL < count_B[:, None])


def _priority(log_p_V: jax.Array, token: jax.Array, order: str, key: jax.Array) -> jax.Array:
    """Returns the priority of a position, []; positions with the highest priority are unmasked first."""
    if order == "random":
        return jax.random.uniform(key)
    if order == "entropy":
        p_V = jnp.exp(log_p_V)
        return jnp.where(p_V > 0, p_V * log_p_V, 0.0).sum()
    if order == "margin":
        first, second = jnp.exp(jax.lax.top_k(log_p_V, 2)[0])
        return first - second
    return log_p_V[token]


def infill(
    config: FrozenConfigDict,
    params: dict,
    texts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    unmasking: UnmaskingParams,
    special: SpecialIds,
    key_B: jax.Array | None = None,
) -> Iterator[list[list[int]]]:
    """Fills in the masked positions of texts, and yields the texts after every forward pass.

    Args:
      config: `config.model`, frozen.
      params: parameters.
      texts: token ids, `<s>` first, with `<mask>` at the positions to fill in; divided into batches.
      sampling: sampling parameters.
      unmasking: unmasking parameters.
      special: the tokenizer's special ids.
      key_B: PRNG key of each text; None: keys of seed 0, see `prompt_batches.prompt_keys`.

    Yields:
      Token ids of all texts. The last item contains the texts without masks.

    Raises:
      UserError: if a text is empty or starts with a mask, which no position predicts.
    """
    check_texts(texts, special)
    key_B = prompt_batches.prompt_keys(0, texts) if key_B is None else key_B
    texts = [list(text) for text in texts]
    for part in prompt_batches.batch_slices(len(texts), max(map(len, texts))):
        tokens_BxL, length_B = prompt_batches.pad_batch(texts[part], special.pad)
        blocks = _divide_into_blocks(tokens_BxL == special.mask, unmasking)
        state = DiffusionState(tokens_BxL, length_B, *blocks, key_B[part], np.int32(0))
        state = prompt_batches.put_beside_params(params, state)
        advance = functools.partial(
            unmask, config, params, sampling=sampling, unmasking=unmasking, special=special
        )
        state = jax.block_until_ready(advance(state, steps=0))  # compiles before the first yield
        while True:
            tokens_BxL = np.asarray(state.tokens_BxL)
            texts[part] = [row[:length].tolist() for row, length in zip(tokens_BxL, length_B, strict=True)]
            yield list(texts)
            if not (tokens_BxL == special.mask).any():
                break
            state = advance(state, steps=1)


def check_texts(texts: Sequence[Sequence[int]], special: SpecialIds) -> None:
    """Raises `UserError` if a text is empty or starts with a mask, which no position predicts."""
    if any(not text or text[0] == special.mask for text in texts):
        raise UserError(
            "a text is empty or starts with <mask>; it must start with another token, such as <s>"
        )


def _divide_into_blocks(masked_BxL: np.ndarray, unmasking: UnmaskingParams) -> tuple[np.ndarray, np.ndarray]:
    """Returns `block_BxL` and `quota_BxL` of `DiffusionState`, both int32."""
    index_BxL = np.cumsum(masked_BxL, axis=1) - 1
    size = unmasking.block or masked_BxL.shape[1]
    block_BxL = np.where(masked_BxL, index_BxL // size, -1)
    quota_BxL = np.zeros_like(block_BxL)
    for row, block_L in enumerate(block_BxL):
        for index in range(block_L.max(initial=-1) + 1):
            is_member_L = block_L == index
            num_masks = is_member_L.sum()
            quota_BxL[row, is_member_L] = min(unmasking.steps or num_masks, num_masks)
    return block_BxL.astype(np.int32), quota_BxL.astype(np.int32)
