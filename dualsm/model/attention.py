"""Attention with one key range per query: query i attends to keys [key_start[i], key_end[i]).

One key range per query expresses every attention pattern used here, including document isolation: causal
[doc_start, i+1), bidirectional [doc_start, doc_end), prefix [doc_start, max(i+1, prefix_end)).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dualsm.devices import sharding
from dualsm.model import flash, splash
from dualsm.model.remat import ATTENTION
from dualsm.process.errors import UserError

BACKENDS = ("auto", "xla", "splash", "flash")
KERNELS = {"tpu": "splash", "gpu": "flash"}  # by platform
QUERIES = 128  # per chunk of long sequences, which saves memory: benchmarks/attention.py


def attend(
    q_BxLxHxK: jax.Array,
    k_BxLxZxK: jax.Array,
    v_BxLxZxK: jax.Array,
    key_start_BxL: jax.Array,
    key_end_BxL: jax.Array,
    backend: str = "auto",
) -> jax.Array:
    """Computes softmax attention, scaled by 1/sqrt(K), with the softmax in float32.

    Args:
      q_BxLxHxK: queries of H heads with head_dim K.
      k_BxLxZxK, v_BxLxZxK: keys and values of Z heads; each is shared by H / Z consecutive query heads
        (grouped-query attention, arXiv 2305.13245).
      key_start_BxL, key_end_BxL: int32; the keys that each query attends to, at least one. All keys of a
        range must have the same `key_start` as the query, as documents do not overlap.
      backend: one of `BACKENDS`: "xla" runs everywhere, "splash" on TPUs, "flash" on NVIDIA GPUs; "auto"
        selects the kernel of the platform if it supports the shapes, otherwise "xla".

    Returns:
      Attended values with the shape and dtype of `q_BxLxHxK`.

    Raises:
      UserError: if the backend does not support the platform or the shapes.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose one of: {', '.join(BACKENDS)}")
    if backend == "auto":
        unsupported = why_not_kernel(q_BxLxHxK.shape, k_BxLxZxK.shape)
        backend = "xla" if unsupported else KERNELS[sharding.platform()]
    if backend == "xla":
        return _xla(q_BxLxHxK, k_BxLxZxK, v_BxLxZxK, key_start_BxL, key_end_BxL)
    if obstacle := _obstacle(backend, q_BxLxHxK.shape, k_BxLxZxK.shape):
        raise UserError(f"config.model.attention={backend} {obstacle}; use auto or xla")
    kernel = {"splash": splash.attend_splash, "flash": flash.attend_flash}[backend]
    heads, ranges = ("batch", None, "heads", None), ("batch", None)
    sharded = sharding.shard_mapped(kernel, (heads, heads, heads, ranges, ranges), heads)
    k_BxLxZxK, v_BxLxZxK = _divisible_heads(k_BxLxZxK), _divisible_heads(v_BxLxZxK)
    return sharded(q_BxLxHxK, k_BxLxZxK, v_BxLxZxK, key_start_BxL, key_end_BxL)


def _divisible_heads(x_BxLxZxK: jax.Array) -> jax.Array:
    """Repeats the heads of keys or values, as often as needed for each shard to get the same number."""
    heads, parts = x_BxLxZxK.shape[2], sharding.divided_by("heads")
    copies = math.lcm(heads, parts) // heads
    return jnp.repeat(x_BxLxZxK, copies, axis=2) if copies > 1 else x_BxLxZxK


def why_not_kernel(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> str | None:
    """Returns why "auto" does not select a kernel for queries [B, L, H, K] and keys [B, L, Z, K], or None."""
    kernel = KERNELS.get(platform := sharding.platform())
    if kernel is None:
        return f"no kernel for {platform}"
    if kernel == "splash" and jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        return "without a mesh, XLA cannot divide the kernel between devices"  # as in generation
    obstacle = _obstacle(kernel, q_shape, k_shape)
    return obstacle and f"the kernel {obstacle}"


def _obstacle(kernel: str, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> str | None:
    """Returns why a kernel does not support the platform or the shapes; None if it does."""
    rows, length, heads, head_dim = q_shape
    names, multiple = {"splash": ("TPUs", splash.BLOCKS[-1]), "flash": ("NVIDIA GPUs", flash.LENGTHS)}[kernel]
    if KERNELS.get(platform := sharding.platform()) != kernel:
        return f"needs {names}, not {platform}"
    if length != k_shape[1] or length % multiple:
        return f"needs a sequence length that is a multiple of {multiple}, not {length}"
    if kernel == "flash" and (head_dim < 16 or head_dim & (head_dim - 1)):
        return f"needs a head_dim that is a power of two of at least 16, not {head_dim}"
    for name, size in (("batch", rows), ("heads", heads)):
        if size % (parts := sharding.divided_by(name)):
            return f"needs a number of {name} that is a multiple of {parts}, the number of shards, not {size}"
    return None


def range_mask(key_start_BxL: jax.Array, key_end_BxL: jax.Array, keys: int) -> jax.Array:
    """Returns the attention mask of key ranges, bool [B, L, keys]; only the XLA backend builds it."""
    positions = jnp.arange(keys, dtype=jnp.int32)
    return (positions >= key_start_BxL[..., None]) & (positions < key_end_BxL[..., None])


def _xla(q_BxLxHxK, k_BxSxZxK, v_BxSxZxK, key_start_BxL, key_end_BxL) -> jax.Array:
    """Computes attention with a mask, in chunks of `QUERIES` for long sequences to avoid an L x S array.

    Moves the head axis forward first: XLA's CPU compiler implements products over [B, L, H, K] with copies,
    which made the backward pass two to three times slower. The backward pass keeps this layout, scaled and
    rotated.
    """
    q_BxHxLxK, k_BxZxSxK, v_BxZxSxK = (
        checkpoint_name(x.swapaxes(1, 2), ATTENTION)
        for x in (q_BxLxHxK * q_BxLxHxK.shape[-1] ** -0.5, k_BxSxZxK, v_BxSxZxK)
    )
    rows, heads, length, head_dim = q_BxHxLxK.shape
    if length <= 2 * QUERIES or length % QUERIES:
        return _masked(q_BxHxLxK, k_BxZxSxK, v_BxZxSxK, key_start_BxL, key_end_BxL).swapaxes(1, 2)

    # Recompute the scores of a chunk in the backward pass instead of keeping the scores of all chunks.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(ATTENTION))
    def part(queries):
        q_BxHxQxK, key_start_BxQ, key_end_BxQ = queries
        return _masked(q_BxHxQxK, k_BxZxSxK, v_BxZxSxK, key_start_BxQ, key_end_BxQ)

    parts = length // QUERIES
    q_NxBxHxQxK = jnp.moveaxis(q_BxHxLxK.reshape(rows, heads, parts, QUERIES, head_dim), 2, 0)
    ranges = (x.reshape(rows, parts, QUERIES).swapaxes(0, 1) for x in (key_start_BxL, key_end_BxL))
    out_NxBxHxQxK = jax.lax.map(part, (q_NxBxHxQxK, *ranges))
    return out_NxBxHxQxK.transpose(1, 0, 3, 2, 4).reshape(q_BxLxHxK.shape)


def _masked(q_BxHxLxK, k_BxZxSxK, v_BxZxSxK, key_start_BxL, key_end_BxL) -> jax.Array:
    """Computes attention of scaled queries; normalizes last, on K numbers per query instead of S."""
    mask_BxLxS = range_mask(key_start_BxL, key_end_BxL, k_BxZxSxK.shape[2])
    bias_BxLxS = jnp.where(mask_BxLxS, 0.0, jnp.finfo(jnp.float32).min)
    scores_BxHxLxS = _grouped_product("bglk,bgsk->bgls", q_BxHxLxK, k_BxZxSxK)
    scores_BxHxLxS += bias_BxLxS[:, None]
    largest_BxHxLx1 = jax.lax.stop_gradient(scores_BxHxLxS.max(-1, keepdims=True))
    weights_BxHxLxS = jnp.exp(scores_BxHxLxS - largest_BxHxLx1)
    attended_BxHxLxK = _grouped_product("bgls,bgsk->bglk", weights_BxHxLxS.astype(v_BxZxSxK.dtype), v_BxZxSxK)
    return _divide(attended_BxHxLxK, weights_BxHxLxS.sum(-1, keepdims=True), v_BxZxSxK.dtype)


def _grouped_product(subscripts: str, left_BxHxLx: jax.Array, right_BxZxSxK: jax.Array) -> jax.Array:
    """Multiplies each head by its head of keys or values, whose queries form one long sequence; float32."""
    rows, heads, length, size = left_BxHxLx.shape
    queries = left_BxHxLx.reshape(rows, right_BxZxSxK.shape[1], -1, size)
    product = jnp.einsum(subscripts, queries, right_BxZxSxK, preferred_element_type=jnp.float32)
    return product.reshape(rows, heads, length, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _divide(x: jax.Array, y: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns x / y as `dtype`; the gradient uses the saved quotient, so that x need not be saved."""
    return (x / y).astype(dtype)


def _divide_forward(x, y, dtype):
    quotient = checkpoint_name(_divide(x, y, dtype), ATTENTION)
    return quotient, (quotient, y)


def _divide_backward(dtype, kept, gradient):
    quotient, y = kept
    gradient_x = gradient.astype(y.dtype) / y
    return gradient_x, -(gradient_x * quotient).sum(-1, keepdims=True)


_divide.defvjp(_divide_forward, _divide_backward)
