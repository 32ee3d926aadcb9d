"""Chunked cross-entropy, which never stores all logits.

The gradients are computed in the forward pass, chunk by chunk, before the logits of a chunk are discarded.
The logits are therefore computed only once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def cross_entropy(
    features_BxLxD: jax.Array,
    kernel_DxV: jax.Array,
    bias_V: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    z_weights_BxL: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes the weighted sum of -log softmax(features @ kernel + bias)[target] and of the z-loss.

    Args:
      features_BxLxD: features in the compute dtype.
      kernel_DxV, bias_V: output matrix and bias.
      targets_BxL: int32.
      weights_BxL: float32; loss weight of each position.
      z_weights_BxL: float32; weight of each position's z-loss, (log sum exp logits)^2
        (PaLM, arXiv 2204.02311).
      chunk: positions per sequence in a chunk.

    Returns:
      total: float32 []; sum(weights * nll) + sum(z_weights * logsumexp^2). Differentiable with
        respect to features, kernel and bias.
      nll_BxL: float32; negative log-likelihood in nats, for reporting only: it has no gradient.
    """
    chunks = _chunks(chunk, features_BxLxD, targets_BxL, weights_BxL, z_weights_BxL)

    def one(total, part):
        features, targets, weights, z_weights = part
        nll, normalizer, _ = _slice(features, kernel_DxV, bias_V, targets)
        return total + jnp.sum(weights * nll + z_weights * normalizer**2), nll

    total, nll_CxBxP = jax.lax.scan(one, jnp.float32(0), chunks)
    return total, _whole(nll_CxBxP, targets_BxL.shape)


def _forward(features_BxLxD, kernel_DxV, bias_V, targets_BxL, weights_BxL, z_weights_BxL, chunk):
    chunks = _chunks(chunk, features_BxLxD, targets_BxL, weights_BxL, z_weights_BxL)

    def one(sums, part):
        total, d_kernel, d_bias = sums
        features, targets, weights, z_weights = part
        nll, normalizer, logits = _slice(features, kernel_DxV, bias_V, targets)
        total += jnp.sum(weights * nll + z_weights * normalizer**2)
        # d total / d logits = (weight + 2 z normalizer) softmax - weight onehot(target)
        scale = weights + 2 * z_weights * normalizer
        d_logits = scale[..., None] * jnp.exp(logits - normalizer[..., None])
        ids = jnp.arange(logits.shape[-1], dtype=targets.dtype)
        d_logits -= jnp.where(ids == targets[..., None], weights[..., None], 0)
        d_bias += d_logits.sum((0, 1))
        d_logits = d_logits.astype(features.dtype)
        d_features = jnp.einsum("bpv,dv->bpd", d_logits, kernel_DxV.astype(features.dtype))
        d_kernel += jnp.einsum("bpd,bpv->dv", features, d_logits, preferred_element_type=jnp.float32)
        return (total, d_kernel, d_bias), (nll, d_features)

    zeros = (jnp.float32(0), jnp.zeros(kernel_DxV.shape, jnp.float32), jnp.zeros(bias_V.shape, jnp.float32))
    (total, d_kernel, d_bias), (nll, d_features) = jax.lax.scan(one, zeros, chunks)
    d_features_BxLxD = _whole(d_features, features_BxLxD.shape)
    gradients = (d_features_BxLxD, d_kernel.astype(kernel_DxV.dtype), d_bias.astype(bias_V.dtype))
    return (total, _whole(nll, targets_BxL.shape)), gradients


def _backward(chunk, gradients, cotangents):
    del chunk
    scale, _ = cotangents
    scaled = tuple((g * scale).astype(g.dtype) for g in gradients)
    return (*scaled, None, None, None)


cross_entropy.defvjp(_forward, _backward)


def _slice(features_BxPxD, kernel_DxV, bias_V, targets_BxP):
    """Returns nll and log normalizer, float32 [B, P], and logits, float32 [B, P, V], of a chunk."""
    kernel_DxV = kernel_DxV.astype(features_BxPxD.dtype)
    logits = jnp.einsum("bpd,dv->bpv", features_BxPxD, kernel_DxV, preferred_element_type=jnp.float32)
    logits += bias_V.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    at_target = jnp.take_along_axis(logits, targets_BxP[..., None], axis=-1)[..., 0]
    return normalizer - at_target, normalizer, logits


def _chunks(chunk: int, *arrays_BxL) -> tuple[jax.Array, ...]:
    """Splits each array along L into chunks, [C, B, P, ...]; pads the last chunk with zeros."""
    length = arrays_BxL[0].shape[1]
    chunk = min(chunk, length)
    parts = -(-length // chunk)

    def cut(a):
        a = jnp.pad(a, [(0, 0), (0, parts * chunk - length)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], parts, chunk, *a.shape[2:]), 1, 0)

    return tuple(cut(a) for a in arrays_BxL)


def _whole(slices_CxBxP: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Concatenates chunks and removes the padding."""
    joined = jnp.moveaxis(slices_CxBxP, 0, 1)
    joined = joined.reshape(joined.shape[0], -1, *joined.shape[3:])
    return joined[:, : shape[1]]
