"""Splash attention, JAX's attention kernel for TPUs, with key ranges as the mask.

The kernel computes blocks of scores in fast memory, so that no L x L array is stored in main memory, and
skips masked blocks. Its mask has three parts, which are computed from the key ranges on the device: the
blocks that are not fully masked; a function of an integer per query and the key's position (the key is
before the end of the range); and segment ids (the start of the range, which all of its keys share). One
call supports any mixture of objectives, and other documents in a row cost nothing outside of shared blocks.

The rows of a batch are concatenated to one long sequence, in which attention stays within each row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualsm.model.remat import ATTENTION

BLOCKS = (512, 256, 128)  # block sizes; the largest that divides L is used. TPUs have 128 lanes


def attend_splash(
    q_BxLxHxK: jax.Array,
    k_BxLxZxK: jax.Array,
    v_BxLxZxK: jax.Array,
    key_start_BxL: jax.Array,
    key_end_BxL: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Implements `attention.attend` for L divisible by one of `BLOCKS`.

    Args:
      interpret: interpret the kernel without a TPU, which is very slow.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    rows, length, _, head_dim = q_BxLxHxK.shape
    size = next(size for size in BLOCKS if length % size == 0)
    offset_Bx1 = jnp.arange(rows, dtype=jnp.int32)[:, None] * length
    start_T, end_T = ((x + offset_Bx1).reshape(-1) for x in (key_start_BxL, key_end_BxL))
    seen_BxIxJ = seen_blocks(key_start_BxL, key_end_BxL, size)

    def mask(axis: int) -> info.MaskInfo:
        """Returns the mask for a kernel that iterates over blocks of keys (axis=2) or queries (axis=1)."""
        blocks = length // size
        next_BxIxJ = next_seen(seen_BxIxJ, axis) + jnp.arange(rows)[:, None, None] * blocks
        # The kernel iterates over L / size blocks; the other axis has the blocks of all rows.
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
        mask_function=is_before_end,
        interpret=interpret,
    )
    q_HxTxK, k_ZxTxK, v_ZxTxK = (
        x.reshape(rows * length, -1, head_dim).swapaxes(0, 1) for x in (q_BxLxHxK, k_BxLxZxK, v_BxLxZxK)
    )
    out_HxTxK = attend(q_HxTxK * head_dim**-0.5, k_ZxTxK, v_ZxTxK, kernel.SegmentIds(start_T, start_T))
    return out_HxTxK.swapaxes(0, 1).reshape(q_BxLxHxK.shape)


def is_before_end(end: jax.Array, position: jax.Array) -> jax.Array:
    """Returns True for keys before the end of the query's range; compiled into the kernel."""
    return position < end


def block_ranges(key_start_BxL: jax.Array, key_end_BxL: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first and last block of keys for each block of queries, int32 [B, L / size]."""
    first_BxI = key_start_BxL.reshape(len(key_start_BxL), -1, size).min(-1) // size
    last_BxI = (key_end_BxL.reshape(len(key_end_BxL), -1, size).max(-1) - 1) // size
    return first_BxI, last_BxI


def seen_blocks(key_start_BxL: jax.Array, key_end_BxL: jax.Array, size: int) -> jax.Array:
    """Returns True where block i of queries uses block j of keys, bool [B, I, J] with I = J = L / size."""
    first_BxI, last_BxI = block_ranges(key_start_BxL, key_end_BxL, size)
    block_J = jnp.arange(first_BxI.shape[1])
    return (block_J >= first_BxI[..., None]) & (block_J <= last_BxI[..., None])


def next_seen(seen_BxIxJ: jax.Array, axis: int) -> jax.Array:
    """Returns the block to prefetch along `axis`: the next used block from each one on, or else the last."""
    blocks = seen_BxIxJ.shape[axis]
    block = jnp.arange(blocks).reshape([-1 if a == axis else 1 for a in range(3)])
    following = jax.lax.cummin(jnp.where(seen_BxIxJ, block, blocks), axis=axis, reverse=True)
    last = jnp.where(seen_BxIxJ, block, 0).max(axis, keepdims=True)
    return jnp.where(following < blocks, following, last)
