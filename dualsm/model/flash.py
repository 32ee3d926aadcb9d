"""FlashAttention (arXiv 2307.08691) on NVIDIA GPUs, with key ranges as the mask.

There are three Pallas kernels, compiled through Triton: the forward pass, the gradient of the queries, and
the gradients of keys and values. Each program loads one block of queries (or keys) of a sequence and visits
only the blocks of keys (or queries) within its ranges. No L x L array is stored in main memory, and blocks
of other documents or above the causal diagonal cost nothing. One call supports any mixture of objectives.

Scores are in base 2, because GPUs have an exp2 instruction.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dualsm.model.block_ranges import Blocks, key_blocks, query_blocks
from dualsm.model.remat import ATTENTION

# The fastest combination on an H200; see docs/performance.md.
FORWARD = BACKWARD_QUERIES = BACKWARD_KEYS = Blocks(queries=64, keys=64, warps=4, stages=3)
LENGTHS = 64  # L must be a multiple of this

HIDDEN = -1e30  # score of masked keys; finite, so that a fully masked block does not result in NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_flash(
    q_BxLxHxK: jax.Array,
    k_BxLxZxK: jax.Array,
    v_BxLxZxK: jax.Array,
    key_start_BxL: jax.Array,
    key_end_BxL: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Implements `attention.attend` for L divisible by `LENGTHS` and K a power of two of at least 16.

    Args:
      interpret: interpret the kernels without a GPU, which is very slow.
    """
    return _forward(q_BxLxHxK, k_BxLxZxK, v_BxLxZxK, key_start_BxL, key_end_BxL, interpret)[0]


def _forward(q_BxLxHxK, k_BxLxZxK, v_BxLxZxK, start_BxL, end_BxL, interpret):
    """Returns attended values and residuals: all arrays and the log2 of each softmax denominator."""
    rows, length, heads, _ = q_BxLxHxK.shape
    layout = _Layout(q_BxLxHxK.shape, k_BxLxZxK.shape[2], FORWARD.queries)
    out, log_sum_BxHxL = pl.pallas_call(
        functools.partial(_forward_kernel, size=FORWARD.keys, scale=_scale(q_BxLxHxK)),
        in_specs=[
            *(layout.block, layout.key_row, layout.key_row),
            *[layout.block_numbers] * 2,
            *[layout.bound] * 4,
        ],
        out_specs=[layout.block, layout.block_statistics],
        out_shape=[
            jax.ShapeDtypeStruct(q_BxLxHxK.shape, q_BxLxHxK.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ],
        name="flash_forward",
        **layout.call(FORWARD, interpret),
    )(q_BxLxHxK, k_BxLxZxK, v_BxLxZxK, start_BxL, end_BxL, *key_blocks(start_BxL, end_BxL, FORWARD))
    out, log_sum_BxHxL = (checkpoint_name(x, ATTENTION) for x in (out, log_sum_BxHxL))
    return out, (q_BxLxHxK, k_BxLxZxK, v_BxLxZxK, start_BxL, end_BxL, out, log_sum_BxHxL)


def _backward(interpret, residuals, d_out_BxLxHxK):
    q_BxLxHxK, k_BxLxZxK, v_BxLxZxK, start_BxL, end_BxL, out_BxLxHxK, log_sum_BxHxL = residuals
    scale, kv_heads = _scale(q_BxLxHxK), k_BxLxZxK.shape[2]
    # Each query head computes its own gradients of keys and values; those of a group are summed in float32.
    d_k_dtype = q_BxLxHxK.dtype if kv_heads == q_BxLxHxK.shape[2] else jnp.float32
    # Softmax correction of the gradients of the scores, one number per query (2307.08691, section 2.3.2).
    delta_BxHxL = jnp.einsum("blhk,blhk->bhl", out_BxLxHxK, d_out_BxLxHxK, preferred_element_type=jnp.float32)
    arrays = (q_BxLxHxK, k_BxLxZxK, v_BxLxZxK, d_out_BxLxHxK, log_sum_BxHxL, delta_BxHxL, start_BxL, end_BxL)

    layout = _Layout(q_BxLxHxK.shape, kv_heads, BACKWARD_QUERIES.queries)
    d_q = pl.pallas_call(
        functools.partial(_backward_queries_kernel, size=BACKWARD_QUERIES.keys, scale=scale),
        in_specs=[
            *(layout.block, layout.key_row, layout.key_row, layout.block),
            *[layout.block_statistics] * 2,
            *[layout.block_numbers] * 2,
            *[layout.bound] * 4,
        ],
        out_specs=layout.block,
        out_shape=jax.ShapeDtypeStruct(q_BxLxHxK.shape, q_BxLxHxK.dtype),
        name="flash_backward_queries",
        **layout.call(BACKWARD_QUERIES, interpret),
    )(*arrays, *key_blocks(start_BxL, end_BxL, BACKWARD_QUERIES))

    layout = _Layout(q_BxLxHxK.shape, kv_heads, BACKWARD_KEYS.keys)
    d_k, d_v = pl.pallas_call(
        functools.partial(_backward_keys_kernel, size=BACKWARD_KEYS.queries, scale=scale),
        in_specs=[
            *(layout.row, layout.key_block, layout.key_block, layout.row),
            *[layout.row_statistics] * 2,
            *[layout.row_numbers] * 2,
            *[layout.bound] * 4,
        ],
        out_specs=[layout.block] * 2,
        out_shape=[jax.ShapeDtypeStruct(q_BxLxHxK.shape, d_k_dtype)] * 2,
        name="flash_backward_keys",
        **layout.call(BACKWARD_KEYS, interpret),
    )(*arrays, *query_blocks(start_BxL, end_BxL, BACKWARD_KEYS))
    d_k, d_v = (_sum_groups(d, kv_heads).astype(q_BxLxHxK.dtype) for d in (d_k, d_v))
    return d_q, d_k, d_v, None, None


def _sum_groups(x_BxLxHxK: jax.Array, kv_heads: int) -> jax.Array:
    """Sums over the query heads that share a head of keys and values; returns [B, L, Z, K]."""
    rows, length, heads, head_dim = x_BxLxHxK.shape
    if heads == kv_heads:
        return x_BxLxHxK
    return x_BxLxHxK.reshape(rows, length, kv_heads, -1, head_dim).sum(3)


attend_flash.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Block specs: each program works on one block of one sequence and head."""

    shape: tuple[int, ...]  # [B, L, H, K]
    kv_heads: int  # Z
    size: int  # block size

    def call(self, blocks: Blocks, interpret: bool) -> dict:
        """Returns the arguments that all kernels share."""
        rows, length, heads, _ = self.shape
        params = triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
        # Consecutive programs share a sequence and head, whose keys (or queries) are then in the cache.
        grid = (length // self.size, heads, rows)
        return {"grid": grid, "compiler_params": params, "interpret": interpret}

    @property
    def block(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.size, None, self.shape[3]), lambda i, h, b: (b, i, h, 0))

    @property
    def row(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.shape[1], None, self.shape[3]), lambda i, h, b: (b, 0, h, 0))

    @property
    def key_block(self) -> pl.BlockSpec:
        """Block of keys or values that the program's query head uses."""
        shape = (None, self.size, None, self.shape[3])
        return pl.BlockSpec(shape, lambda i, h, b: (b, i, self._kv_head(h), 0))

    @property
    def key_row(self) -> pl.BlockSpec:
        shape = (None, self.shape[1], None, self.shape[3])
        return pl.BlockSpec(shape, lambda i, h, b: (b, 0, self._kv_head(h), 0))

    def _kv_head(self, head):
        group = self.shape[2] // self.kv_heads
        return head if group == 1 else jax.lax.div(head, jnp.asarray(group, head.dtype))

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


def _visit(bounds: Sequence, body: Callable, carry):
    """Runs body(i, carry, full) over the blocks of a `BlockRange`; `bounds` are refs to its four fields."""
    first, full_first, full_end, end = (ref[...] for ref in bounds)
    masked, full = functools.partial(body, full=False), functools.partial(body, full=True)
    carry = jax.lax.fori_loop(first, full_first, masked, carry)
    carry = jax.lax.fori_loop(full_first, full_end, full, carry)
    return jax.lax.fori_loop(full_end, end, masked, carry)


def _scores(a_MxK: jax.Array, b_NxK: jax.Array, seen_MxN: jax.Array | None) -> jax.Array:
    """Returns products of queries and keys before scaling; `HIDDEN` for keys outside the range of a query."""
    scores_MxN = triton.dot(a_MxK, b_NxK.T)
    return scores_MxN if seen_MxN is None else jnp.where(seen_MxN, scores_MxN, HIDDEN)


def _forward_kernel(q_ref, k_ref, v_ref, start_ref, end_ref, *refs, size, scale):
    *bounds, out_ref, log_sum_ref = refs
    scale *= math.log2(math.e)
    q_QxK, start_Qx1, end_Qx1 = q_ref[...], start_ref[...][:, None], end_ref[...][:, None]

    def add_keys(j, carry, full):
        out_QxK, largest_Q, sum_Q = carry
        keys = pl.ds(j * size, size)
        key_S = j * size + jnp.arange(size)
        seen_QxS = None if full else (start_Qx1 <= key_S) & (key_S < end_Qx1)
        scores_QxS = _scores(q_QxK, k_ref[keys, :], seen_QxS)
        new_largest_Q = jnp.maximum(largest_Q, scores_QxS.max(-1))
        # The first form is one multiply-add. The second is exact for hidden scores, which are huge: before
        # a query has seen a key, the weights of hidden keys are 1; its first key makes `shrink_Q` 0.
        if full:
            exponent_QxS = scores_QxS * scale - (new_largest_Q * scale)[:, None]
        else:
            exponent_QxS = (scores_QxS - new_largest_Q[:, None]) * scale
        weights_QxS = jnp.exp2(exponent_QxS)
        shrink_Q = jnp.exp2((largest_Q - new_largest_Q) * scale)
        v_SxK = v_ref[keys, :]
        out_QxK = out_QxK * shrink_Q[:, None] + triton.dot(weights_QxS.astype(v_SxK.dtype), v_SxK)
        return out_QxK, new_largest_Q, sum_Q * shrink_Q + weights_QxS.sum(-1)

    queries = q_QxK.shape[0]
    nothing = (jnp.zeros(q_QxK.shape, jnp.float32), jnp.full(queries, HIDDEN), jnp.zeros(queries))
    out_QxK, largest_Q, sum_Q = _visit(bounds, add_keys, nothing)
    out_ref[...] = (out_QxK / sum_Q[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = largest_Q * scale + jnp.log2(sum_Q)


def _backward_queries_kernel(
    q_ref, k_ref, v_ref, d_out_ref, log_sum_ref, delta_ref, start_ref, end_ref, *refs, size, scale
):
    *bounds, d_q_ref = refs
    q_QxK, d_out_QxK = q_ref[...], d_out_ref[...]
    log_sum_Qx1, delta_Qx1, start_Qx1, end_Qx1 = (
        x[...][:, None] for x in (log_sum_ref, delta_ref, start_ref, end_ref)
    )

    def add_keys(j, d_q_QxK, full):
        keys = pl.ds(j * size, size)
        key_S = j * size + jnp.arange(size)
        k_SxK = k_ref[keys, :]
        seen_QxS = None if full else (start_Qx1 <= key_S) & (key_S < end_Qx1)
        scores_QxS = _scores(q_QxK, k_SxK, seen_QxS) * (scale * math.log2(math.e))
        weights_QxS = jnp.exp2(scores_QxS - log_sum_Qx1)
        d_scores_QxS = weights_QxS * (triton.dot(d_out_QxK, v_ref[keys, :].T) - delta_Qx1)
        return d_q_QxK + triton.dot(d_scores_QxS.astype(k_SxK.dtype), k_SxK)

    d_q_QxK = _visit(bounds, add_keys, jnp.zeros(q_QxK.shape, jnp.float32))
    d_q_ref[...] = (d_q_QxK * scale).astype(d_q_ref.dtype)


def _backward_keys_kernel(
    q_ref, k_ref, v_ref, d_out_ref, log_sum_ref, delta_ref, start_ref, end_ref, *refs, size, scale
):
    """Works on keys by queries, so that the next products need no transposition."""
    *bounds, d_k_ref, d_v_ref = refs
    k_SxK, v_SxK = k_ref[...], v_ref[...]
    keys = k_SxK.shape[0]
    key_Sx1 = (pl.program_id(0) * keys + jnp.arange(keys))[:, None]

    def add_queries(i, carry, full):
        d_k_SxK, d_v_SxK = carry
        queries = pl.ds(i * size, size)
        q_QxK, d_out_QxK = q_ref[queries, :], d_out_ref[queries, :]
        log_sum_Q, delta_Q = log_sum_ref[queries], delta_ref[queries]
        seen_SxQ = None if full else (start_ref[queries] <= key_Sx1) & (key_Sx1 < end_ref[queries])
        scores_SxQ = _scores(k_SxK, q_QxK, seen_SxQ) * (scale * math.log2(math.e))
        weights_SxQ = jnp.exp2(scores_SxQ - log_sum_Q)
        d_v_SxK += triton.dot(weights_SxQ.astype(d_out_QxK.dtype), d_out_QxK)
        d_scores_SxQ = weights_SxQ * (triton.dot(v_SxK, d_out_QxK.T) - delta_Q)
        return d_k_SxK + triton.dot(d_scores_SxQ.astype(q_QxK.dtype), q_QxK), d_v_SxK

    zeros_SxK = jnp.zeros(k_SxK.shape, jnp.float32)
    d_k_SxK, d_v_SxK = _visit(bounds, add_queries, (zeros_SxK, zeros_SxK))
    d_k_ref[...] = (d_k_SxK * scale).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v_SxK.astype(d_v_ref.dtype)
