"""Selects tokens to mask, and masks them for a model that predicts token i + 1 at position i."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def lowest(scores_L: jax.Array, among_L: jax.Array, k: jax.Array) -> jax.Array:
    """Returns the `k` positions of `among_L` with the lowest scores, bool [L]; earlier positions win ties.

    Args:
      scores_L: float32 [L], all below 2.
      among_L: bool [L].
      k: int32 []; at most the number of positions in `among_L`.
    """
    order_L = jnp.argsort(jnp.where(among_L, scores_L, 2.0), stable=True)
    return jnp.zeros_like(among_L).at[order_L].set(jnp.arange(order_L.shape[0]) < k)


def choose(key: jax.Array, among_L: jax.Array, k: jax.Array) -> jax.Array:
    """Returns `k` positions of `among_L`, chosen uniformly at random, bool [L]."""
    return lowest(jax.random.uniform(key, among_L.shape), among_L, k)


def portion(fraction: jax.Array, n: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns `fraction * n`, rounded stochastically by a draw from U[0, 1) with an exact mean, int32."""
    return jnp.minimum(jnp.floor(fraction * n + uniform).astype(jnp.int32), n)


def hide(inputs_L: jax.Array, masked_L: jax.Array, token: jax.Array | int) -> jax.Array:
    """Returns the inputs with token i + 1 replaced where position i must predict it, int32 [L].

    Args:
      inputs_L: int32 [L]; the first token is never replaced.
      masked_L: bool [L]; True at the positions that predict.
      token: int32 []; or [L], one replacement per position of the inputs.
    """
    hidden_L = jnp.concatenate([jnp.zeros(1, bool), masked_L[:-1]])
    return jnp.where(hidden_L, token, inputs_L)


def low_above_high(options: Mapping) -> str:
    """Returns an error message if the range `low`..`high` of an objective's options is empty, else ""."""
    low, high = options["low"], options["high"]
    return f"low={low} is above high={high}; swap them" if low > high else ""
