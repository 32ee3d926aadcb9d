"""One step of self-speculative decoding: drafting by masks, and verification by the causal mode.

A draft of K tokens comes from one forward pass on the text's last token and K - 1 masks. The masks attend to
each other and to the keys and values of the text in the causal cache. The query of the last token is causal,
so the first drafted token is a sample from the causal distribution and needs no test; the masks predict the
others. A second forward pass computes the causal distributions after each drafted token.

Source: speculative sampling (Leviathan et al., arXiv 2211.17192).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dualsm.data.tokenizer import SpecialIds
from dualsm.generation.autoregressive import Cache, forward_with_cache
from dualsm.generation.sampling_params import SamplingParams, filter_logits, map_positions, mask_reserved_ids
from dualsm.model.transformer import Transformer


class Draft(NamedTuple):
    """Drafted tokens of a batch of texts, computed for P positions.

    Attributes:
      tokens_BxP: drafted tokens for the positions `length_B`, `length_B + 1`, ...
      log_q_BxP: log-probability with which each was drawn, float32.
      features_BxPxD: features from which each was drawn.
      size_B: number of tokens that each text drafts, from 1 to P; the others are ignored.
    """

    tokens_BxP: jax.Array
    log_q_BxP: jax.Array
    features_BxPxD: jax.Array
    size_B: jax.Array


def log_distribution(
    model: Transformer, features_D: jax.Array, sampling: SamplingParams, special: SpecialIds
) -> jax.Array:
    """Returns the log-probabilities of the next token, as sampled: with temperature, top-k and top-p, [V]."""
    logits_V = mask_reserved_ids(model.output_logits(features_D), special, allow_eos=True)
    return jax.nn.log_softmax(filter_logits(logits_V, sampling))


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
      size_B: number of tokens to draft of each text, at most `size`; its draft does not depend on `size`.
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


def draw_draft(
    model: Transformer,
    features_BxPxD: jax.Array,
    size_B: jax.Array,
    key_BxP: jax.Array,
    sampling: SamplingParams,
    special: SpecialIds,
) -> Draft:
    """Draws the drafted tokens from the features of `draft_features`, independently of each other."""

    def draw(features_D, key):
        log_q_V = log_distribution(model, features_D, sampling, special)
        token = _draw(log_q_V, key, sampling)
        return token, log_q_V[token]

    return Draft(*map_positions(draw, features_BxPxD, key_BxP), features_BxPxD, size_B)


def target_features(
    model: Transformer, draft: Draft, length_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs the verifying forward pass.

    Args:
      model: the model.
      draft: the drafted tokens.
      length_B: number of tokens of each text before the draft.
      cache: the cache after `draft_features`.

    Returns:
      features_BxP1xD, from which the causal distributions of the drafted tokens and of the token after them
      follow, and the cache with the drafted tokens. To reject tokens is to reduce the length of the text:
      later passes replace their keys and values before a query attends to them.
    """
    features_BxPxD, cache = forward_with_cache(model, draft.tokens_BxP, length_B, None, cache)
    return jnp.concatenate([draft.features_BxPxD[:, :1], features_BxPxD], axis=1), cache


def log_acceptance(
    model: Transformer,
    draft: Draft,
    features_BxP1xD: jax.Array,
    sampling: SamplingParams,
    special: SpecialIds,
) -> jax.Array:
    """Returns the log of the probability min(1, p/q) that each drafted token is accepted, [B, P].

    The first token of a draft has probability 1, those after the draft's size 0.

    Args:
      model: the model.
      draft: the drafted tokens, with log q.
      features_BxP1xD: from `target_features`.
      sampling: sampling parameters of both distributions.
      special: the tokenizer's special ids.
    """

    def log_p(features_D, token):
        return log_distribution(model, features_D, sampling, special)[token]

    log_p_BxP = map_positions(log_p, features_BxP1xD[:, :-1], draft.tokens_BxP)
    offset_P = jnp.arange(draft.tokens_BxP.shape[1])
    log_ratio_BxP = jnp.where(offset_P == 0, 0.0, jnp.minimum(log_p_BxP - draft.log_q_BxP, 0.0))
    return jnp.where(offset_P < draft.size_B[:, None], log_ratio_BxP, -jnp.inf)


def draw_next(
    model: Transformer,
    draft: Draft,
    features_BxP1xD: jax.Array,
    accepted_B: jax.Array,
    key_B: jax.Array,
    sampling: SamplingParams,
    special: SpecialIds,
) -> jax.Array:
    """Draws the token after the accepted ones, int32 [B].

    After a rejection its distribution is max(p - q, 0), normalized; after a complete draft it is p.

    Args:
      model: the model.
      draft: the drafted tokens.
      features_BxP1xD: from `target_features`.
      accepted_B: number of accepted tokens of each text.
      key_B: PRNG key of each text.
      sampling: sampling parameters of both distributions.
      special: the tokenizer's special ids.
    """
    is_rejected_B = accepted_B < draft.size_B
    features = (features_BxP1xD, jnp.concatenate([draft.features_BxPxD, features_BxP1xD[:, -1:]], axis=1))
    p_Bx1xD, q_Bx1xD = (jnp.take_along_axis(x, accepted_B[:, None, None], axis=1) for x in features)

    def draw(p_D, q_D, is_rejected, key):
        log_p_V, log_q_V = (log_distribution(model, x_D, sampling, special) for x_D in (p_D, q_D))
        return _draw(jnp.where(is_rejected, log_residual(log_p_V, log_q_V), log_p_V), key, sampling)

    return map_positions(draw, p_Bx1xD, q_Bx1xD, is_rejected_B[:, None], key_B[:, None])[:, 0]


def log_residual(log_p_V: jax.Array, log_q_V: jax.Array) -> jax.Array:
    """Returns log max(p - q, 0) up to a constant; log p if p equals q, which is then never rejected."""
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
