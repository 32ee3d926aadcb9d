"""The blocks of keys and queries that the kernels of flash.py visit, from the key ranges."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of a kernel in queries and keys, and Triton's compilation parameters."""

    queries: int
    keys: int
    warps: int
    stages: int


class BlockRange(NamedTuple):
    """Range of blocks [first, end) that each program visits; blocks in [full_first, full_end) need no mask.

    A block needs no mask if all of its queries attend to all of its keys. Each field is int32, with one
    number per program.
    """

    first: jax.Array
    full_first: jax.Array
    full_end: jax.Array
    end: jax.Array


def key_blocks(key_start_BxL: jax.Array, key_end_BxL: jax.Array, blocks: Blocks) -> BlockRange:
    """Returns the range of key blocks for each block of queries, [B, I]."""
    shape = (len(key_start_BxL), -1, blocks.queries)
    start_BxIxQ, end_BxIxQ = key_start_BxL.reshape(shape), key_end_BxL.reshape(shape)
    first_BxI, end_BxI = start_BxIxQ.min(-1) // blocks.keys, pl.cdiv(end_BxIxQ.max(-1), blocks.keys)
    full_first_BxI = jnp.clip(pl.cdiv(start_BxIxQ.max(-1), blocks.keys), first_BxI, end_BxI)
    full_end_BxI = jnp.clip(end_BxIxQ.min(-1) // blocks.keys, full_first_BxI, end_BxI)
    return BlockRange(first_BxI, full_first_BxI, full_end_BxI, end_BxI)


def query_blocks(key_start_BxL: jax.Array, key_end_BxL: jax.Array, blocks: Blocks) -> BlockRange:
    """Returns the range of query blocks for each block of keys, [B, J].

    Queries within the range that do not attend to the keys are masked. Only the first contiguous run of
    blocks that need no mask skips the mask.
    """
    shape = (len(key_start_BxL), -1, blocks.queries)
    start_BxIxQ, end_BxIxQ = key_start_BxL.reshape(shape), key_end_BxL.reshape(shape)
    key_J = jnp.arange(0, key_start_BxL.shape[1], blocks.keys, dtype=jnp.int32)
    seen_BxIxJ = (start_BxIxQ.min(-1)[..., None] < key_J + blocks.keys) & (
        end_BxIxQ.max(-1)[..., None] > key_J
    )
    full_BxIxJ = (start_BxIxQ.max(-1)[..., None] <= key_J) & (
        end_BxIxQ.min(-1)[..., None] >= key_J + blocks.keys
    )
    count = start_BxIxQ.shape[1]
    i_Ix1 = jnp.arange(count, dtype=jnp.int32)[:, None]
    first_BxJ = jnp.where(seen_BxIxJ, i_Ix1, count).min(1)
    end_BxJ = jnp.where(seen_BxIxJ, i_Ix1 + 1, 0).max(1)
    full_first_BxJ = jnp.minimum(jnp.where(full_BxIxJ, i_Ix1, count).min(1), end_BxJ)
    after_BxIxJ = ~full_BxIxJ & (i_Ix1 >= full_first_BxJ[:, None])
    full_end_BxJ = jnp.minimum(jnp.where(after_BxIxJ, i_Ix1, count).min(1), end_BxJ)
    return BlockRange(first_BxJ, full_first_BxJ, full_end_BxJ, end_BxJ)
