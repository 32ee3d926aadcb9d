"""Checksums of the train state, which detect checkpoints that have changed on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


def checksums(tree) -> dict[str, int]:
    """Returns the checksum of each array by its path ("params/embedding/embedding").

    A checksum is the sum, modulo 2^32, of hashes of each word and its position (finalizer of MurmurHash3).
    The hash is a bijection, so that a change of any one word changes the sum; other damage remains undetected
    with a probability of 2^-32. Integer sums do not depend on the order, and so not on the sharding.
    """
    return start_checksums(tree)()


def checksums_one_by_one(tree) -> dict[str, int]:
    """Computes `checksums` array by array, which needs less memory but compiles more programs."""
    sums = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        replicated = isinstance(leaf, jax.Array) and leaf.is_fully_replicated
        sums[_name(path)] = int(_sums([leaf], replicated)[0])
    return sums


def start_checksums(tree) -> Callable[[], dict[str, int]]:
    """Dispatches the computation of the checksums; afterwards the arrays of `tree` may be donated.

    Returns:
      A function that waits for the checksums and returns them.
    """
    replicated = all(x.is_fully_replicated for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    paths, sums_N = [_name(path) for path, _ in jax.tree.leaves_with_path(tree)], _sums(tree, replicated)
    return lambda: dict(zip(paths, jax.device_get(sums_N).tolist(), strict=True))


def changed(tree, expected: Mapping[str, int]) -> list[str]:
    """Returns the paths of the arrays in `tree` whose checksum differs from the expected one."""
    return [path for path, found in checksums(tree).items() if expected.get(path) != found]


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.partial(jax.jit, static_argnames="replicated")
def _sums(tree, replicated: bool) -> jax.Array:
    return jnp.stack([_sum(leaf, replicated) for leaf in jax.tree.leaves(tree)])


def _sum(array: jax.Array, replicated: bool) -> jax.Array:
    word = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    words = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    position, stride = jnp.zeros_like(words), 1
    for axis in reversed(range(array.ndim)):  # without a reshape, which would gather a sharded array
        position += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    hashes = _mix(words ^ _mix(position + 1))
    # XLA's CPU compiler vectorizes additions of arrays but not reductions of one array. Therefore add the
    # layers, or the eighths of a replicated matrix, before the final reduction.
    if replicated and array.ndim == 2 and len(array) % 8 == 0:
        hashes = hashes.reshape(8, -1, array.shape[1])
    if hashes.ndim > 2:
        hashes = functools.reduce(jnp.add, hashes)
    return jnp.sum(hashes, dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
