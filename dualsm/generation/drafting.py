"""One step of self-speculative decoding: drafting by masks, and verification by the causal mode.

A draft of K tokens comes from one forward pass on the text's last token and K - 1 masks. The masks attend to
each other and to the keys and values of the text in the causal cache. The query of the last token is causal,
so the first drafted token is a sample from the causal distribution and needs no verification; the masks
predict the others. A second forward pass computes the causal distribution after each drafted token.

Source: speculative sampling (Leviathan et al., arXiv 2211.17192).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dualsm.data.tokenizer import SpecialIds
from dualsm.generation.autoregressive import Cache, forward_with_cache
from dualsm.generation.sampling_params import SamplingParams, filter_logits, mask_reserved_ids
from dualsm.model.transformer import Transformer


class Draft(NamedTuple):
    """Drafted tokens of a batch of texts, computed for P positions.

    Attributes:
      tokens_BxP: drafted tokens for the positions `length_B`, `length_B + 1`, ...
      log_q_BxPxV: log-probabilities of the distribution that each token was drawn from, float32.
      size_B: number of drafted tokens of each text, from 1 to P; later positions are ignored.
    """

    tokens_BxP: jax.Array
    log_q_BxPxV: jax.Array
    size_B: jax.Array


def draft_features(
    model: Transformer,
    last_B: jax.Array,
    length_B: jax.Array,
    size_B: jax.Array,
    cache: Cache,
    *,
    size: int,
    mask: int,
) -> tuple[jax.Array, Cache]:
    """Runs the drafting forward pass.

    Args:
      model: the model.
      last_B: last token of each text.
      length_B: number of tokens of each text; nothing is stored for lengths above the size of the cache.
      size_B: number of tokens to draft for each text, at most `size`; drafts do not depend on `size`.
      cache: causal keys and values of all positions before the last token.
      size: P.
      mask: id of `<mask>`.

    Returns:
      features_BxPxD, which predict the tokens at `length_B`, `length_B + 1`, ..., and the cache, which is
      causal up to the last token.
    """
    is_mask_P = jnp.arange(size) > 0
    key_end_BxP = length_B[:, None] + jnp.where(is_mask_P, size_B[:, None] - 1, 0)
    inputs_BxP = jnp.where(is_mask_P, mask, last_B[:, None])
    return forward_with_cache(model, inputs_BxP, length_B - 1, key_end_BxP, cache)


def log_distributions(
    model: Transformer, features_BxPxD: jax.Array, sampling: SamplingParams, special: SpecialIds
) -> jax.Array:
    """Returns the log-probabilities of sampling with temperature, top-k and top-p, float32 [B, P, V]."""

    def log_distribution(logits_V):
        logits_V = mask_reserved_ids(logits_V, special, allow_eos=True)
        return jax.nn.log_softmax(filter_logits(logits_V, sampling))

    return jax.vmap(jax.vmap(log_distribution))(model.output_logits(features_BxPxD))


def draw_draft(
    log_q_BxPxV: jax.Array, size_B: jax.Array, key_BxP: jax.Array, sampling: SamplingParams
) -> Draft:
    """Draws the drafted tokens independently of each other, `size_B` for each text."""
    draw = jax.vmap(jax.vmap(functools.partial(_draw, sampling=sampling)))
    return Draft(draw(log_q_BxPxV, key_BxP), log_q_BxPxV, size_B)


def verify(
    model: Transformer,
    draft: Draft,
    length_B: jax.Array,
    cache: Cache,
    sampling: SamplingParams,
    special: SpecialIds,
) -> tuple[jax.Array, Cache]:
    """Runs the verifying forward pass.

    Args:
      model: the model.
      draft: the drafted tokens.
      length_B: number of tokens of each text before the draft.
      cache: the cache after `draft_features`.
      sampling: sampling parameters.
      special: the tokenizer's special ids.

    Returns:
      log_p_BxP1xV, the causal distributions of the drafted tokens and of the token after them, and the cache
      with the drafted tokens. Reducing the length of a text rejects tokens: later passes overwrite their
      keys and values before any query attends to them.
    """
    features_BxPxD, cache = forward_with_cache(model, draft.tokens_BxP, length_B, None, cache)
    log_p_BxPxV = log_distributions(model, features_BxPxD, sampling, special)
    return jnp.concatenate([draft.log_q_BxPxV[:, :1], log_p_BxPxV], axis=1), cache


def log_acceptance(draft: Draft, log_p_BxP1xV: jax.Array) -> jax.Array:
    """Returns the log of the probability min(1, p/q) that each drafted token is accepted, [B, P].

    The probability is 1 for the first token of a draft, and 0 for tokens beyond the size of the draft.
    """
    log_p_BxP, log_q_BxP = (
        jnp.take_along_axis(x, draft.tokens_BxP[..., None], axis=2)[..., 0]
        for x in (log_p_BxP1xV[:, :-1], draft.log_q_BxPxV)
    )
    is_drafted_BxP = jnp.arange(draft.tokens_BxP.shape[1]) < draft.size_B[:, None]
    return jnp.where(is_drafted_BxP, jnp.minimum(log_p_BxP - log_q_BxP, 0.0), -jnp.inf)


def draw_next(
    draft: Draft,
    log_p_BxP1xV: jax.Array,
    accepted_B: jax.Array,
    key_B: jax.Array,
    sampling: SamplingParams,
) -> jax.Array:
    """Draws the token after the accepted ones, int32 [B].

    After a rejection its distribution is max(p - q, 0), normalized; after a complete draft it is p.

    Args:
      draft: the drafted tokens.
      log_p_BxP1xV: from `verify`.
      accepted_B: number of accepted tokens of each text.
      key_B: PRNG key of each text.
      sampling: sampling parameters.
    """
    rows, last = jnp.arange(len(accepted_B)), draft.tokens_BxP.shape[1] - 1
    log_p_BxV = log_p_BxP1xV[rows, accepted_B]
    log_q_BxV = draft.log_q_BxPxV[rows, jnp.minimum(accepted_B, last)]
    log_residual_BxV = jax.vmap(log_residual)(log_p_BxV, log_q_BxV)
    log_next_BxV = jnp.where((accepted_B < draft.size_B)[:, None], log_residual_BxV, log_p_BxV)
    return jax.vmap(functools.partial(_draw, sampling=sampling))(log_next_BxV, key_B)


def log_residual(log_p_V: jax.Array, log_q_V: jax.Array) -> jax.Array:
    """Returns log max(p - q, 0) up to a constant; log p if p equals q, because then no token is rejected."""
    residual_V = jnp.maximum(jnp.exp(log_p_V) - jnp.exp(log_q_V), 0.0)
    return jnp.where(residual_V.sum() > 0, jnp.log(residual_V), log_p_V)


def _draw(log_p_V: jax.Array, key: jax.Array, sampling: SamplingParams) -> jax.Array:
    drawn = jnp.argmax(log_p_V) if sampling.greedy else jax.random.categorical(key, log_p_V)
    return drawn.astype(jnp.int32)


@functools.partial(jax.vmap, in_axes=(0, 0, None))
@functools.partial(jax.vmap, in_axes=(None, 0, None))
def position_keys(key: jax.Array, position: jax.Array, use: int) -> jax.Array:
    """Returns the keys of positions [B, P] for one use, from the key of each text, [B]."""
    return jax.random.fold_in(jax.random.fold_in(key, position), use)
