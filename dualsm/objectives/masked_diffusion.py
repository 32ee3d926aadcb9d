"""Shifted masked diffusion (masked next-token prediction), whose loss is a bound on the likelihood.

Source: LLaDA (arXiv 2502.09992) for the bound with exact counts, arXiv 2512.14549 for the shift.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualsm.objectives.example import Example, Row, SpecialIds, document_spans, has_target, is_text


def masked_diffusion(row: Row, key: jax.Array, special: SpecialIds) -> Example:
    """Masks k of the row's n maskable tokens, k uniform on 1..n, and weighs each by n/k.

    Maskable are the text tokens that some position has to predict. With k uniform the expected loss is
    exactly the negative evidence bound of an any-order model,

        sum over k of 1/n * n/k * E[sum of nll over k masked tokens],

    divided by n; t = k/n plays the part of the diffusion time. (The paper's code draws
    k = max(1, int(n*t + U)), which favours k = 1 by half a count and is not quite unbiased.)

    Args:
      row: a packed row; its stratified draw is the time.
      key: draws the time and the places.
      special: its `mask` replaces masked tokens.
    """
    time_key, place_key = jax.random.split(key)
    maskable_L = has_target(row) & is_text(row.tokens_L1[1:])
    n = maskable_L.sum()
    k = jnp.minimum(1 + jnp.floor(row.uniform(time_key) * n).astype(jnp.int32), n)
    masked_L = choose(place_key, maskable_L, k)
    # Token i + 1 is masked where position i predicts it; the row's first token is always seen.
    hidden_L = jnp.concatenate([jnp.zeros(1, bool), masked_L[:-1]])
    start_L, end_L = document_spans(row.documents_L1[:-1])
    return Example(
        inputs_L=jnp.where(hidden_L, special.mask, row.tokens_L1[:-1]),
        targets_L=row.tokens_L1[1:],
        weights_L=jnp.where(masked_L, n / jnp.maximum(k, 1), 0.0),
        counted_L=maskable_L.astype(jnp.float32),
        key_start_L=start_L,
        key_end_L=end_L,
    )


def choose(key: jax.Array, among_L: jax.Array, k: jax.Array) -> jax.Array:
    """A uniformly random choice of `k` of the positions in `among_L`, bool [L]."""
    scores_L = jnp.where(among_L, jax.random.uniform(key, among_L.shape), 2.0)
    rank_L = jnp.argsort(jnp.argsort(scores_L))
    return among_L & (rank_L < k)
