"""Attention of new tokens to the keys and values in a cache, and to each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualsm.model.attention import QUERIES

_NOT_ATTENDED = float(jnp.finfo(jnp.float32).min)


def attend_with_cache(
    q_BxPxHxK: jax.Array,
    k_BxPxZxK: jax.Array,
    v_BxPxZxK: jax.Array,
    keys_BxZxSxK: jax.Array,
    values_BxZxSxK: jax.Array,
    position_B: jax.Array,
    key_end_BxP: jax.Array,
) -> jax.Array:
    """Computes the attention of P new tokens of each text, as if their keys and values were in the cache.

    The cache is only read. The caller stores the new keys and values of all layers after the last layer.

    Args:
      q_BxPxHxK: queries of H heads.
      k_BxPxZxK, v_BxPxZxK: keys and values of the new tokens; each of the Z heads is shared by H / Z
        consecutive query heads.
      keys_BxZxSxK, values_BxZxSxK: the cache; entries from `position_B` on are not used.
      position_B: position of the first new token of each text.
      key_end_BxP: position after the last key that each new token attends to, at least 1.

    Returns:
      Attended values with the shape and dtype of `q_BxPxHxK`.
    """
    rows, new, heads, size = q_BxPxHxK.shape
    kv_heads, dtype = k_BxPxZxK.shape[2], v_BxPxZxK.dtype
    q_PxBxZxGxK = (q_BxPxHxK * size**-0.5).swapaxes(0, 1).reshape(new, rows, kv_heads, -1, size)
    k_BxZxPxK, v_BxZxPxK = k_BxPxZxK.swapaxes(1, 2), v_BxPxZxK.swapaxes(1, 2)
    cached_S, new_P = jnp.arange(keys_BxZxSxK.shape[2]), position_B[:, None] + jnp.arange(new)

    def attend_one(query):
        """Attention of one new token of each text."""
        q_BxZxGxK, key_end_B = query
        end_Bx1 = key_end_B[:, None]
        is_key = (cached_S < jnp.minimum(position_B[:, None], end_Bx1), new_P < end_Bx1)
        scores = [
            jnp.where(
                mask[:, None, None],
                jnp.einsum("bzgk,bzsk->bzgs", q_BxZxGxK, keys, preferred_element_type=jnp.float32),
                _NOT_ATTENDED,
            )
            for keys, mask in zip((keys_BxZxSxK, k_BxZxPxK), is_key, strict=True)
        ]
        largest = jnp.maximum(*(score.max(-1, keepdims=True) for score in scores))
        weights = [jnp.exp(score - largest) for score in scores]
        total = sum(weight.sum(-1, keepdims=True) for weight in weights)
        attended_BxZxGxK = sum(
            jnp.einsum("bzgs,bzsk->bzgk", weight.astype(dtype), values, preferred_element_type=jnp.float32)
            for weight, values in zip(weights, (values_BxZxSxK, v_BxZxPxK), strict=True)
        )
        return (attended_BxZxGxK / total).astype(dtype)

    # In chunks, so that the scores of many new tokens are not in memory at the same time.
    attended_PxBxZxGxK = jax.lax.map(attend_one, (q_PxBxZxGxK, key_end_BxP.T), batch_size=QUERIES)
    return attended_PxBxZxGxK.reshape(new, rows, heads, size).swapaxes(0, 1)
