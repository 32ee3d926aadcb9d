"""Attention on NVIDIA GPUs: FlashAttention (arXiv 2307.08691), told what to see by key ranges.

Three kernels in Pallas, which JAX compiles through Triton: the forward pass, the gradient of the queries and
those of keys and values. Each of their programs holds one block of a row and walks over the blocks of the
other side that its ranges reach, so that no L x L array ever lies in main memory, and blocks of other
documents, or above the diagonal of causal rows, cost nothing. One call serves any mixture of objectives.

Scores are in base 2: exp2 is what GPUs have an instruction for.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dualsm.model.remat import ATTENTION


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a kernel divides its work: queries and keys a block, and what Triton is to make of a program."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = Blocks(queries=128, keys=64, warps=8, stages=3)
BACKWARD_QUERIES = Blocks(queries=128, keys=32, warps=8, stages=3)
BACKWARD_KEYS = Blocks(queries=32, keys=128, warps=8, stages=3)
LENGTHS = 128  # what L is a multiple of

HIDDEN = -1e30  # score of what is not seen; finite, so that a block without anything seen gives no NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_flash(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    key_start_BxL: jax.Array,
    key_end_BxL: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attend`, for L that `LENGTHS` divides and K a power of two from 16 on.

    Args:
      interpret: run the kernels' programs without a GPU, very slowly.
    """
    return _forward(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, key_start_BxL, key_end_BxL, interpret)[0]


def _forward(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, start_BxL, end_BxL, interpret):
    """Attended values, and what the backward pass takes: all arrays and, base 2, the logarithm of each
    softmax's denominator."""
    rows, length, heads, _ = q_BxLxHxK.shape
    layout = _Layout(q_BxLxHxK.shape, FORWARD.queries)
    out, log_sum_BxHxL = pl.pallas_call(
        functools.partial(_forward_kernel, size=FORWARD.keys, scale=_scale(q_BxLxHxK)),
        in_specs=[layout.block, layout.row, layout.row, *[layout.block_numbers] * 2, *[layout.bound] * 2],
        out_specs=[layout.block, layout.block_statistics],
        out_shape=[
            jax.ShapeDtypeStruct(q_BxLxHxK.shape, q_BxLxHxK.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ],
        name="flash_forward",
        **layout.call(FORWARD, interpret),
    )(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, start_BxL, end_BxL, *key_blocks(start_BxL, end_BxL, FORWARD))
    out, log_sum_BxHxL = (checkpoint_name(x, ATTENTION) for x in (out, log_sum_BxHxL))
    return out, (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, start_BxL, end_BxL, out, log_sum_BxHxL)


def _backward(interpret, residuals, d_out_BxLxHxK):
    q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, start_BxL, end_BxL, out_BxLxHxK, log_sum_BxHxL = residuals
    scale, gradient = _scale(q_BxLxHxK), jax.ShapeDtypeStruct(q_BxLxHxK.shape, q_BxLxHxK.dtype)
    # What the softmax takes off the gradients of its scores, a number a query (2307.08691, section 2.3.2).
    delta_BxHxL = jnp.einsum("blhk,blhk->bhl", out_BxLxHxK, d_out_BxLxHxK, preferred_element_type=jnp.float32)
    arrays = (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, d_out_BxLxHxK, log_sum_BxHxL, delta_BxHxL, start_BxL, end_BxL)

    layout = _Layout(q_BxLxHxK.shape, BACKWARD_QUERIES.queries)
    d_q = pl.pallas_call(
        functools.partial(_backward_queries_kernel, size=BACKWARD_QUERIES.keys, scale=scale),
        in_specs=[
            *(layout.block, layout.row, layout.row, layout.block),
            *[layout.block_statistics] * 2,
            *[layout.block_numbers] * 2,
            *[layout.bound] * 2,
        ],
        out_specs=layout.block,
        out_shape=gradient,
        name="flash_backward_queries",
        **layout.call(BACKWARD_QUERIES, interpret),
    )(*arrays, *key_blocks(start_BxL, end_BxL, BACKWARD_QUERIES))

    layout = _Layout(q_BxLxHxK.shape, BACKWARD_KEYS.keys)
    d_k, d_v = pl.pallas_call(
        functools.partial(_backward_keys_kernel, size=BACKWARD_KEYS.queries, scale=scale),
        in_specs=[
            *(layout.row, layout.block, layout.block, layout.row),
            *[layout.row_statistics] * 2,
            *[layout.row_numbers] * 2,
            *[layout.bound] * 2,
        ],
        out_specs=[layout.block] * 2,
        out_shape=[gradient] * 2,
        name="flash_backward_keys",
        **layout.call(BACKWARD_KEYS, interpret),
    )(*arrays, *query_blocks(start_BxL, end_BxL, BACKWARD_KEYS))
    return d_q, d_k, d_v, None, None


attend_flash.defvjp(_forward, _backward)


def key_blocks(key_start_BxL, key_end_BxL, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """First block of keys that each block of queries walks over, and the one after the last; int32 [B, I]."""
    shape = (len(key_start_BxL), -1, blocks.queries)
    first_BxI = key_start_BxL.reshape(shape).min(-1) // blocks.keys
    return first_BxI, pl.cdiv(key_end_BxL.reshape(shape).max(-1), blocks.keys)


def query_blocks(key_start_BxL, key_end_BxL, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """First block of queries that each block of keys walks over, and the one after the last; int32 [B, J].

    Between the two may lie queries that see none of the keys; the kernel masks them.
    """
    shape = (len(key_start_BxL), -1, blocks.queries)
    start_BxI, end_BxI = key_start_BxL.reshape(shape).min(-1), key_end_BxL.reshape(shape).max(-1)
    first_key_J = jnp.arange(0, key_start_BxL.shape[1], blocks.keys)
    seen_BxIxJ = (start_BxI[..., None] < first_key_J + blocks.keys) & (end_BxI[..., None] > first_key_J)
    number_I = jnp.arange(start_BxI.shape[1], dtype=jnp.int32)[:, None]
    first_BxJ = jnp.where(seen_BxIxJ, number_I, len(number_I)).min(1)
    return first_BxJ, jnp.where(seen_BxIxJ, number_I + 1, 0).max(1)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which part of each array a program has: it works on one block of one row and head."""

    shape: tuple[int, ...]  # [B, L, H, K]
    size: int  # positions of the block

    def call(self, blocks: Blocks, interpret: bool) -> dict:
        """What all kernels are called with alike."""
        rows, length, heads, _ = self.shape
        params = triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
        # Programs that follow each other have the same row and head, whose other side is then in the cache.
        grid = (length // self.size, heads, rows)
        return {"grid": grid, "compiler_params": params, "interpret": interpret}

    @property
    def block(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.size, None, self.shape[3]), lambda i, h, b: (b, i, h, 0))

    @property
    def row(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.shape[1], None, self.shape[3]), lambda i, h, b: (b, 0, h, 0))

    @property
    def block_statistics(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.size), lambda i, h, b: (b, h, i))

    @property
    def row_statistics(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.shape[1]), lambda i, h, b: (b, h, 0))

    @property
    def block_numbers(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.size), lambda i, h, b: (b, i))

    @property
    def row_numbers(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.shape[1]), lambda i, h, b: (b, 0))

    @property
    def bound(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None), lambda i, h, b: (b, i))


def _scale(q_BxLxHxK: jax.Array) -> float:
    return q_BxLxHxK.shape[-1] ** -0.5


def _scores(a_MxK: jax.Array, b_NxK: jax.Array, seen_MxN: jax.Array, scale: float) -> jax.Array:
    return jnp.where(seen_MxN, triton.dot(a_MxK, b_NxK.T) * (scale * math.log2(math.e)), HIDDEN)


def _forward_kernel(
    q_ref, k_ref, v_ref, start_ref, end_ref, first_ref, past_ref, out_ref, log_sum_ref, *, size, scale
):
    q_QxK, start_Qx1, end_Qx1 = q_ref[...], start_ref[...][:, None], end_ref[...][:, None]

    def walk(j, carry):
        out_QxK, largest_Q, sum_Q = carry
        keys = pl.ds(j * size, size)
        key_S = j * size + jnp.arange(size)
        scores_QxS = _scores(q_QxK, k_ref[keys, :], (start_Qx1 <= key_S) & (key_S < end_Qx1), scale)
        new_largest_Q = jnp.maximum(largest_Q, scores_QxS.max(-1))
        weights_QxS = jnp.exp2(scores_QxS - new_largest_Q[:, None])
        # Before a query has seen anything its weights are of hidden keys; the first it sees makes this 0.
        shrink_Q = jnp.exp2(largest_Q - new_largest_Q)
        v_SxK = v_ref[keys, :]
        out_QxK = out_QxK * shrink_Q[:, None] + triton.dot(weights_QxS.astype(v_SxK.dtype), v_SxK)
        return out_QxK, new_largest_Q, sum_Q * shrink_Q + weights_QxS.sum(-1)

    queries = q_QxK.shape[0]
    nothing = (jnp.zeros(q_QxK.shape, jnp.float32), jnp.full(queries, HIDDEN), jnp.zeros(queries))
    out_QxK, largest_Q, sum_Q = jax.lax.fori_loop(first_ref[...], past_ref[...], walk, nothing)
    out_ref[...] = (out_QxK / sum_Q[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = largest_Q + jnp.log2(sum_Q)


def _backward_queries_kernel(
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    log_sum_ref,
    delta_ref,
    start_ref,
    end_ref,
    first_ref,
    past_ref,
    d_q_ref,
    *,
    size,
    scale,
):
    q_QxK, d_out_QxK = q_ref[...], d_out_ref[...]
    log_sum_Qx1, delta_Qx1, start_Qx1, end_Qx1 = (
        x[...][:, None] for x in (log_sum_ref, delta_ref, start_ref, end_ref)
    )

    def walk(j, d_q_QxK):
        keys = pl.ds(j * size, size)
        key_S = j * size + jnp.arange(size)
        k_SxK = k_ref[keys, :]
        scores_QxS = _scores(q_QxK, k_SxK, (start_Qx1 <= key_S) & (key_S < end_Qx1), scale)
        weights_QxS = jnp.exp2(scores_QxS - log_sum_Qx1)
        d_scores_QxS = weights_QxS * (triton.dot(d_out_QxK, v_ref[keys, :].T) - delta_Qx1)
        return d_q_QxK + triton.dot(d_scores_QxS.astype(k_SxK.dtype), k_SxK)

    d_q_QxK = jax.lax.fori_loop(first_ref[...], past_ref[...], walk, jnp.zeros(q_QxK.shape, jnp.float32))
    d_q_ref[...] = (d_q_QxK * scale).astype(d_q_ref.dtype)


def _backward_keys_kernel(
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    log_sum_ref,
    delta_ref,
    start_ref,
    end_ref,
    first_ref,
    past_ref,
    d_k_ref,
    d_v_ref,
    *,
    size,
    scale,
):
    """Keys by queries, so that what is multiplied next need not be transposed."""
    k_SxK, v_SxK = k_ref[...], v_ref[...]
    keys = k_SxK.shape[0]
    key_Sx1 = (pl.program_id(0) * keys + jnp.arange(keys))[:, None]

    def walk(i, carry):
        d_k_SxK, d_v_SxK = carry
        queries = pl.ds(i * size, size)
        q_QxK, d_out_QxK = q_ref[queries, :], d_out_ref[queries, :]
        log_sum_Q, delta_Q, start_Q, end_Q = (
            x[queries] for x in (log_sum_ref, delta_ref, start_ref, end_ref)
        )
        scores_SxQ = _scores(k_SxK, q_QxK, (start_Q <= key_Sx1) & (key_Sx1 < end_Q), scale)
        weights_SxQ = jnp.exp2(scores_SxQ - log_sum_Q)
        d_v_SxK += triton.dot(weights_SxQ.astype(d_out_QxK.dtype), d_out_QxK)
        d_scores_SxQ = weights_SxQ * (triton.dot(v_SxK, d_out_QxK.T) - delta_Q)
        return d_k_SxK + triton.dot(d_scores_SxQ.astype(q_QxK.dtype), q_QxK), d_v_SxK

    zeros_SxK = jnp.zeros(k_SxK.shape, jnp.float32)
    d_k_SxK, d_v_SxK = jax.lax.fori_loop(first_ref[...], past_ref[...], walk, (zeros_SxK, zeros_SxK))
    d_k_ref[...] = (d_k_SxK * scale).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v_SxK.astype(d_v_ref.dtype)
