"""Attention on TPUs: JAX's splash attention kernel, told what to see by key ranges instead of by a mask.

The kernel walks over blocks of scores in fast memory, so that no L x L array ever lies in main memory, and
skips the blocks it is told to. It takes a mask as three things, all of which follow from the ranges on the
device: which blocks hold anything, an integer a query with a function of it and of a key's position (here:
the key lies before the range's end), and segments (here: the keys of a range have its start). So one call
serves any mixture of objectives, and other documents of a row cost nothing beyond the blocks they share.

The rows of a batch are laid end to end as one long sequence, in which a row's blocks see that row's alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualsm.model.remat import ATTENTION

BLOCKS = (512, 256, 128)  # positions a block, the largest that divides L; TPU lanes come by 128


def attend_splash(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    key_start_BxL: jax.Array,
    key_end_BxL: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attend`, for L that one of `BLOCKS` divides.

    Args:
      interpret: run the kernel's program without a TPU, very slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    rows, length, heads, width = q_BxLxHxK.shape
    size = next(size for size in BLOCKS if length % size == 0)
    offset_Bx1 = jnp.arange(rows, dtype=jnp.int32)[:, None] * length
    start_T, end_T = ((x + offset_Bx1).reshape(-1) for x in (key_start_BxL, key_end_BxL))
    seen_BxIxJ = seen_blocks(key_start_BxL, key_end_BxL, size)

    def mask(axis: int) -> info.MaskInfo:
        """`axis` is what the kernel walks along: 2, blocks of keys; 1, blocks of queries."""
        blocks = length // size
        next_BxIxJ = next_seen(seen_BxIxJ, axis) + jnp.arange(rows)[:, None, None] * blocks
        # The walk is one of L / size blocks; the other axis runs through the blocks of all rows.
        arrays = (jnp.moveaxis(x.astype(jnp.int32), 0, 2 - axis) for x in (next_BxIxJ, seen_BxIxJ))
        shape = (1, rows * blocks, blocks) if axis == 2 else (1, blocks, rows * blocks)
        data_next, block_mask = (x.reshape(shape) for x in arrays)
        return info.MaskInfo(data_next, None, block_mask, None, end_T)

    attend = kernel.SplashAttentionKernel(
        fwd_mask_info=mask(axis=2),
        dq_mask_info=mask(axis=2),
        dkv_mask_info=mask(axis=1),
        block_sizes=kernel.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=ATTENTION,
        mask_function=lies_before_end,
        interpret=interpret,
    )
    q_HxTxK, k_HxTxK, v_HxTxK = (
        x.reshape(rows * length, heads, width).swapaxes(0, 1) for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK)
    )
    out_HxTxK = attend(q_HxTxK * width**-0.5, k_HxTxK, v_HxTxK, kernel.SegmentIds(start_T, start_T))
    return out_HxTxK.swapaxes(0, 1).reshape(q_BxLxHxK.shape)


def lies_before_end(end: jax.Array, position: jax.Array) -> jax.Array:
    """Whether keys lie before the ends of the queries' ranges. The kernel compiles it into itself."""
    return position < end


def block_ranges(key_start_BxL: jax.Array, key_end_BxL: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """First and last block of keys that each block of `size` queries works through, int32 [B, L / size]."""
    first_BxI = key_start_BxL.reshape(len(key_start_BxL), -1, size).min(-1) // size
    last_BxI = (key_end_BxL.reshape(len(key_end_BxL), -1, size).max(-1) - 1) // size
    return first_BxI, last_BxI


def seen_blocks(key_start_BxL: jax.Array, key_end_BxL: jax.Array, size: int) -> jax.Array:
    """Whether block i of queries works through block j of keys, bool [B, I, J] with I = J = L / size."""
    first_BxI, last_BxI = block_ranges(key_start_BxL, key_end_BxL, size)
    block_J = jnp.arange(first_BxI.shape[1])
    return (block_J >= first_BxI[..., None]) & (block_J <= last_BxI[..., None])


def next_seen(seen_BxIxJ: jax.Array, axis: int) -> jax.Array:
    """The block along `axis` to be fetched at each: itself where seen, else the next seen, else the last."""
    blocks = seen_BxIxJ.shape[axis]
    block = jnp.arange(blocks).reshape([-1 if a == axis else 1 for a in range(3)])
    following = jax.lax.cummin(jnp.where(seen_BxIxJ, block, blocks), axis=axis, reverse=True)
    last = jnp.where(seen_BxIxJ, block, 0).max(axis, keepdims=True)
    return jnp.where(following < blocks, following, last)
