"""Output heads: the layers from the last block to the features, and the output layer for the logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from dualsm.model.layers import linear, norm


class ProjectedHead(nnx.Module):
    """Head of the paper: RMSNorm -> Linear -> GELU -> output matrix with bias."""

    def __init__(self, config: ml_collections.ConfigDict, embedding: nnx.Embed, *, rngs: nnx.Rngs):
        self.norm = norm(config, rngs=rngs)
        self.projection = linear(config, config.d_model, config.d_model, rngs=rngs)
        if config.tie_word_embeddings:
            self.output = Tied(embedding)
        else:
            self.output = linear(config, config.d_model, config.vocab_size, bias=True, rngs=rngs)

    def features(self, x_TxD: jax.Array) -> jax.Array:
        """Returns the input of the output matrix, [T, D]."""
        return jax.nn.gelu(self.projection(self.norm(x_TxD)), approximate=True)


class PlainHead(nnx.Module):
    """Head of Llama: RMSNorm -> output matrix."""

    def __init__(self, config: ml_collections.ConfigDict, embedding: nnx.Embed, *, rngs: nnx.Rngs):
        self.norm = norm(config, rngs=rngs)
        if config.tie_word_embeddings:
            self.output = TiedUnbiased(embedding)
        else:
            self.output = Unbiased(linear(config, config.d_model, config.vocab_size, rngs=rngs))

    def features(self, x_TxD: jax.Array) -> jax.Array:
        """Returns the input of the output matrix, [T, D]."""
        return self.norm(x_TxD)


class Unbiased(nnx.Module):
    """Output layer without a bias parameter; `bias` is zero, because the loss requires one."""

    def __init__(self, linear: nnx.Linear):
        self.kernel, self.dtype = linear.kernel, linear.dtype

    @property
    def bias(self) -> jax.Array:
        return jnp.zeros(self.kernel.shape[-1], jnp.float32)

    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        return x_BxD @ self.kernel[...].astype(self.dtype)


class Tied(nnx.Module):
    """Output layer whose matrix is the transposed embedding, with a bias."""

    def __init__(self, embedding: nnx.Embed):
        self.embedding, self.dtype = embedding.embedding, embedding.dtype
        self.bias = nnx.Param(jnp.zeros(embedding.num_embeddings, jnp.float32))

    @property
    def kernel(self) -> jax.Array:
        return self.embedding[...].T

    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        return x_BxD @ self.kernel.astype(self.dtype) + self.bias[...].astype(self.dtype)


class TiedUnbiased(nnx.Module):
    """Output layer whose matrix is the transposed embedding; `bias` is zero, as in `Unbiased`."""

    def __init__(self, embedding: nnx.Embed):
        self.embedding, self.dtype = embedding.embedding, embedding.dtype

    @property
    def kernel(self) -> jax.Array:
        return self.embedding[...].T

    @property
    def bias(self) -> jax.Array:
        return jnp.zeros(self.embedding.shape[0], jnp.float32)

    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        return x_BxD @ self.kernel.astype(self.dtype)


HEADS = {"projected": ProjectedHead, "plain": PlainHead}
