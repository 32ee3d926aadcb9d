"""Checksums of the training state, so that a checkpoint whose bits have changed on disk is noticed."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp


def checksums(tree) -> dict[str, int]:
    """The checksum of each array, by its path ("params/embedding/embedding").

    A checksum is the sum, modulo 2^32, of a hash of each word and its place (MurmurHash3's finaliser). The
    hash is one to one, so that any one changed word changes the sum; other damage goes unseen once in 2^32
    times. Integer sums do not depend on order, hence neither on the devices that the array lies on.
    """
    paths = [_name(path) for path, _ in jax.tree.leaves_with_path(tree)]
    return dict(zip(paths, map(int, jax.device_get(_sums(tree))), strict=True))


def changed(tree, expected: Mapping[str, int]) -> list[str]:
    """Paths of the arrays in `tree` whose checksum is not the expected one."""
    return [path for path, found in checksums(tree).items() if expected.get(path) != found]


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit
def _sums(tree) -> list[jax.Array]:
    return [_sum(leaf) for leaf in jax.tree.leaves(tree)]


def _sum(array: jax.Array) -> jax.Array:
    word = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    words = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    place, stride = jnp.zeros_like(words), 1
    for axis in reversed(range(array.ndim)):  # not by a reshape, which would gather a sharded array
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    hashes = _mix(words ^ _mix(place + 1))
    if array.ndim > 2:  # stacks of layers are first added layer to layer, which CPUs do in vectors
        hashes = functools.reduce(jnp.add, hashes)
    return jnp.sum(hashes, dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
