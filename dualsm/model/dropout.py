"""Dropout whose mask is a function of a key per row, so that it is the same on any number of devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def fold_layers(keys_Bx2: jax.Array, layers: int) -> tuple[jax.Array, jax.Array]:
    """Returns the keys of the embedding, [B, 2], and of attention and MLP of each layer, [N, 2, B, 2]."""
    keys_B = jax.random.wrap_key_data(keys_Bx2, impl="threefry2x32")
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    keys = jax.random.key_data(fold(keys_B, jnp.arange(2 * layers + 1)))
    return keys[-1], keys[:-1].reshape(layers, 2, *keys_Bx2.shape)


def dropout(x_TxD: jax.Array, keys_Bx2: jax.Array | None, rate: float) -> jax.Array:
    """Sets each element to 0 with probability `rate` and divides the others by 1 - rate.

    The mask is a hash of the key and the position: MurmurHash3's finalizer, keyed before and between its
    multiplications, without its last shift, which does not change the high bits. JAX's own generators would
    take longer than the layers of a small model.

    Args:
      x_TxD: activations of B rows, T = B * L.
      keys_Bx2: uint32; random keys of the rows; None returns `x_TxD`.
      rate: probability, in [0, 1).
    """
    if keys_Bx2 is None:
        return x_TxD
    rows, width = len(keys_Bx2), x_TxD.shape[1]
    shape = (rows, x_TxD.shape[0] // rows, width)
    position = jax.lax.broadcasted_iota(jnp.uint32, shape, 1) * jnp.uint32(width)
    position += jax.lax.broadcasted_iota(jnp.uint32, shape, 2)
    first, second = (keys_Bx2[:, i, None, None] for i in (0, 1))
    word = position * jnp.uint32(0x9E3779B9) + first
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B) ^ second
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    keep_TxD = (word >= jnp.uint32(rate * 2**32)).reshape(x_TxD.shape)
    return jnp.where(keep_TxD, x_TxD * (1 / (1 - rate)), 0)
