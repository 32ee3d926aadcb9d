"""Checksums of the train state, which detect checkpoints that have changed on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


def checksums(tree) -> dict[str, int]:
    """Returns the checksum of each array by its path ("params/embedding/embedding").

    A checksum is the sum, modulo 2^32, of a hash of each word and its place (MurmurHash3's finaliser). The
    hash is one to one, so that any one changed word changes the sum; other damage goes unseen once in 2^32
    times. Integer sums do not depend on order, hence neither on the devices that the array lies on.
    """
    return started(tree)()


def started(tree) -> Callable[[], dict[str, int]]:
    """Starts on the checksums of `tree`, whose arrays may then be given away; returns what waits for them."""
    whole = all(x.is_fully_replicated for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    paths, sums_N = [_name(path) for path, _ in jax.tree.leaves_with_path(tree)], _sums(tree, whole)
    return lambda: dict(zip(paths, jax.device_get(sums_N).tolist(), strict=True))


def changed(tree, expected: Mapping[str, int]) -> list[str]:
    """Returns the paths of the arrays in `tree` whose checksum differs from the expected one."""
    return [path for path, found in checksums(tree).items() if expected.get(path) != found]


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.partial(jax.jit, static_argnames="whole")
def _sums(tree, whole: bool) -> jax.Array:
    return jnp.stack([_sum(leaf, whole) for leaf in jax.tree.leaves(tree)])


def _sum(array: jax.Array, whole: bool) -> jax.Array:
    word = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    words = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    place, stride = jnp.zeros_like(words), 1
    for axis in reversed(range(array.ndim)):  # not by a reshape, which would gather a sharded array
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    hashes = _mix(words ^ _mix(place + 1))
    # XLA's CPU compiler adds up an array one word after the other, but arrays to one another in vectors: so
    # layers come first, or eighths of a matrix, where devices hold it whole.
    if whole and array.ndim == 2 and len(array) % 8 == 0:
        hashes = hashes.reshape(8, -1, array.shape[1])
    if hashes.ndim > 2:
        hashes = functools.reduce(jnp.add, hashes)
    return jnp.sum(hashes, dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
