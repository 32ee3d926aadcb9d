"""Attention from key ranges: query i of a row sees keys [key_start[i], key_end[i]) and no others.

That says all the views used here, document isolation included: causal [doc_start, i+1), bidirectional
[doc_start, doc_end), prefix [doc_start, max(i+1, prefix_end)).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dualsm.devices import sharding
from dualsm.model import flash, splash
from dualsm.model.remat import ATTENTION
from dualsm.process.errors import UserError

BACKENDS = ("auto", "xla", "splash", "flash")
KERNELS = {"tpu": "splash", "gpu": "flash"}  # by platform
QUERIES = 128  # at once, in rows of more than twice as many, to hold less: benchmarks/attention.py


def attend(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    key_start_BxL: jax.Array,
    key_end_BxL: jax.Array,
    backend: str = "auto",
) -> jax.Array:
    """Softmax attention, scaled by 1/sqrt(K), softmax in float32.

    Args:
      q_BxLxHxK, k_BxLxHxK, v_BxLxHxK: queries, keys, values of H heads of width K.
      key_start_BxL, key_end_BxL: int32; the keys each query sees, at least one. The keys of a range have
        its start as their own: documents do not overlap.
      backend: one of `BACKENDS`; "xla" runs everywhere, "splash" on TPUs, "flash" on NVIDIA GPUs; "auto" is
        the kernel of the platform where it supports the shapes, else "xla".

    Returns:
      The attended values, shaped and typed as `q_BxLxHxK`.

    Raises:
      UserError: when the backend asked for cannot do it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; there are {', '.join(BACKENDS)}")
    if backend == "auto":
        unsupported = why_not_kernel(q_BxLxHxK.shape, k_BxLxHxK.shape)
        backend = "xla" if unsupported else KERNELS[sharding.platform()]
    if backend == "xla":
        return _xla(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, key_start_BxL, key_end_BxL)
    if obstacle := _obstacle(backend, q_BxLxHxK.shape, k_BxLxHxK.shape):
        raise UserError(f"config.model.attention={backend} {obstacle}; take auto or xla")
    kernel = {"splash": splash.attend_splash, "flash": flash.attend_flash}[backend]
    heads, ranges = ("batch", None, "heads", None), ("batch", None)
    divided = sharding.shard_mapped(kernel, (heads, heads, heads, ranges, ranges), heads)
    return divided(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, key_start_BxL, key_end_BxL)


def why_not_kernel(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> str | None:
    """Returns why "auto" is not a kernel for arrays of these shapes, [B, L, H, K]; None if it is one."""
    kernel = KERNELS.get(platform := sharding.platform())
    if kernel is None:
        return f"no kernel for {platform}"
    obstacle = _obstacle(kernel, q_shape, k_shape)
    return obstacle and f"the kernel {obstacle}"


def _obstacle(kernel: str, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> str | None:
    """Why a kernel cannot attend to such arrays here, if so."""
    rows, length, heads, width = q_shape
    names, multiple = {"splash": ("TPUs", splash.BLOCKS[-1]), "flash": ("NVIDIA GPUs", flash.LENGTHS)}[kernel]
    if KERNELS.get(platform := sharding.platform()) != kernel:
        return f"needs {names}, not {platform}"
    if length != k_shape[1] or length % multiple:
        return f"needs rows of a multiple of {multiple} positions, not {length}"
    if kernel == "flash" and (width < 16 or width & (width - 1)):
        return f"needs heads whose width is a power of two from 16 on, not {width}"
    for name, size in (("batch", rows), ("heads", heads)):
        if size % (parts := sharding.divided_by(name)):
            return f"needs {name} that {parts} devices can share, not {size}"
    return None


def range_mask(key_start_BxL: jax.Array, key_end_BxL: jax.Array, keys: int) -> jax.Array:
    """The mask the ranges stand for, bool [B, L, keys]; only the XLA backend builds it."""
    positions = jnp.arange(keys, dtype=jnp.int32)
    return (positions >= key_start_BxL[..., None]) & (positions < key_end_BxL[..., None])


def _xla(q_BxLxHxK, k_BxSxHxK, v_BxSxHxK, key_start_BxL, key_end_BxL) -> jax.Array:
    """Plain attention with a mask. Long rows of a multiple of `QUERIES` go by so many queries at once, so
    that no L x S array is held.

    Heads go in front first: XLA's CPU compiler turns products over [B, L, H, K] into copies, which made the
    backward pass two to three times slower. That is how they are kept for it, scaled and rotated.
    """
    q_BxHxLxK, k_BxHxSxK, v_BxHxSxK = (
        checkpoint_name(x.swapaxes(1, 2), ATTENTION)
        for x in (q_BxLxHxK * q_BxLxHxK.shape[-1] ** -0.5, k_BxSxHxK, v_BxSxHxK)
    )
    rows, heads, length, width = q_BxHxLxK.shape
    if length <= 2 * QUERIES or length % QUERIES:
        return _masked(q_BxHxLxK, k_BxHxSxK, v_BxHxSxK, key_start_BxL, key_end_BxL).swapaxes(1, 2)

    # The backward pass computes the scores of a part again, instead of holding those of all.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(ATTENTION))
    def part(queries):
        q_BxHxQxK, key_start_BxQ, key_end_BxQ = queries
        return _masked(q_BxHxQxK, k_BxHxSxK, v_BxHxSxK, key_start_BxQ, key_end_BxQ)

    parts = length // QUERIES
    q_NxBxHxQxK = jnp.moveaxis(q_BxHxLxK.reshape(rows, heads, parts, QUERIES, width), 2, 0)
    ranges = (x.reshape(rows, parts, QUERIES).swapaxes(0, 1) for x in (key_start_BxL, key_end_BxL))
    out_NxBxHxQxK = jax.lax.map(part, (q_NxBxHxQxK, *ranges))
    return out_NxBxHxQxK.transpose(1, 0, 3, 2, 4).reshape(q_BxLxHxK.shape)


def _masked(q_BxHxLxK, k_BxHxSxK, v_BxHxSxK, key_start_BxL, key_end_BxL) -> jax.Array:
    """Attention of scaled queries. The softmax is divided last, on K numbers a query instead of S."""
    mask_BxLxS = range_mask(key_start_BxL, key_end_BxL, k_BxHxSxK.shape[2])
    bias_BxLxS = jnp.where(mask_BxLxS, 0.0, jnp.finfo(jnp.float32).min)
    scores_BxHxLxS = jnp.einsum("bhlk,bhsk->bhls", q_BxHxLxK, k_BxHxSxK, preferred_element_type=jnp.float32)
    scores_BxHxLxS += bias_BxLxS[:, None]
    largest_BxHxLx1 = jax.lax.stop_gradient(scores_BxHxLxS.max(-1, keepdims=True))
    weights_BxHxLxS = jnp.exp(scores_BxHxLxS - largest_BxHxLx1)
    attended_BxHxLxK = jnp.einsum(
        "bhls,bhsk->bhlk",
        weights_BxHxLxS.astype(v_BxHxSxK.dtype),
        v_BxHxSxK,
        preferred_element_type=jnp.float32,
    )
    return _divide(attended_BxHxLxK, weights_BxHxLxS.sum(-1, keepdims=True), v_BxHxSxK.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _divide(x: jax.Array, y: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x / y as `dtype`, with a gradient by the quotient, which is kept anyway: by x, the attended values
    would be computed again for it."""
    return (x / y).astype(dtype)


def _divide_forward(x, y, dtype):
    quotient = checkpoint_name(_divide(x, y, dtype), ATTENTION)
    return quotient, (quotient, y)


def _divide_backward(dtype, kept, gradient):
    quotient, y = kept
    gradient_x = gradient.astype(y.dtype) / y
    return gradient_x, -(gradient_x * quotient).sum(-1, keepdims=True)


_divide.defvjp(_divide_forward, _divide_backward)
