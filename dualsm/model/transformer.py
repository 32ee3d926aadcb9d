"""The transformer: pre-norm blocks with RoPE and SwiGLU, scanned over layers, and an output head.

The model is independent of objectives: it maps tokens and key ranges to features for next-token prediction.
The residual stream is flat, [T, D] with T = B * L. Matrices are [inputs, outputs], and the parameters of
the blocks are stacked along a leading layer axis.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from dualsm.devices.sharding import constrain, divided_by, platform
from dualsm.model import remat
from dualsm.model.attention import attend

TENSOR_CORE_MULTIPLE = 64  # other matrix sizes halve the speed on GPUs, see docs/performance.md


def _initializer(fan_in: int, scale: float = 1.0):
    """Truncated normal with standard deviation scale * sqrt(2 / (5 * fan_in)), as in GPT-BERT."""
    return nnx.initializers.truncated_normal(scale * (2 / (5 * fan_in)) ** 0.5)


def _linear(config, inputs: int, outputs: int, *, scale: float = 1.0, bias: bool = False, rngs: nnx.Rngs):
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=_initializer(config.d_model, scale),
        dtype=config.dtype,
        rngs=rngs,
    )


def _norm(config, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.d_model, epsilon=config.norm_eps, dtype=config.dtype, rngs=rngs)


def rotary_angles(positions_L: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of the rotary embedding, each float32 [..., L, 1, K/2]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_L.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxLxHxK: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies the rotary embedding in rotate-half form (RoFormer, arXiv 2104.09864)."""
    cos, sin = (a.astype(x_BxLxHxK.dtype) for a in angles)
    first, second = jnp.split(x_BxLxHxK, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Pre-norm multi-head attention."""

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        d_model = config.d_model
        self.num_heads = config.num_heads
        self.norm = _norm(config, rngs=rngs)
        self.query = _linear(config, d_model, d_model, rngs=rngs)
        self.key = _linear(config, d_model, d_model, rngs=rngs)
        self.value = _linear(config, d_model, d_model, rngs=rngs)
        self.output = _linear(config, d_model, d_model, scale=(2 * config.num_layers) ** -0.5, rngs=rngs)

    def project(self, x_TxD: jax.Array, rows: int, angles) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries and keys, and values, each [B, L, H, K] with B = `rows`."""
        x_TxD = self.norm(x_TxD)
        shape = (rows, x_TxD.shape[0] // rows, self.num_heads, x_TxD.shape[1] // self.num_heads)
        q, k, v = (f(x_TxD).reshape(shape) for f in (self.query, self.key, self.value))
        return rotate(q, angles), rotate(k, angles), v

    def merge(self, heads_BxLxHxK: jax.Array) -> jax.Array:
        """Applies the output projection to the attended values; returns [T, D]."""
        rows, length, heads, head_dim = heads_BxLxHxK.shape
        return self.output(heads_BxLxHxK.reshape(rows * length, heads * head_dim))


class MLP(nnx.Module):
    """Pre-norm SwiGLU: down(value(x) * silu(gate(x)))."""

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        d_model, d_ff = config.d_model, config.d_ff
        self.norm = _norm(config, rngs=rngs)
        self.value = _linear(config, d_model, d_ff, rngs=rngs)
        self.gate = _linear(config, d_model, d_ff, rngs=rngs)
        self.down = _linear(config, d_ff, d_model, scale=(2 * config.num_layers) ** -0.5, rngs=rngs)

    def __call__(self, x_TxD: jax.Array) -> jax.Array:
        x_TxD = self.norm(x_TxD)
        padding = -self.value.kernel.shape[-1] % TENSOR_CORE_MULTIPLE
        if padding and platform() == "gpu" and divided_by("mlp") == 1:
            return self._with_padding(x_TxD, padding)
        return self.down(self.value(x_TxD) * jax.nn.silu(self.gate(x_TxD)))

    def _with_padding(self, x_TxD: jax.Array, padding: int) -> jax.Array:
        """Computes the MLP with matrices zero-padded along F."""
        kernels = (linear.kernel[...].astype(x_TxD.dtype) for linear in (self.value, self.gate, self.down))
        value_DxF, gate_DxF, down_FxD = kernels
        value_DxF, gate_DxF = (jnp.pad(x, [(0, 0), (0, padding)]) for x in (value_DxF, gate_DxF))
        down_FxD = jnp.pad(down_FxD, [(0, padding), (0, 0)])
        return ((x_TxD @ value_DxF) * jax.nn.silu(x_TxD @ gate_DxF)) @ down_FxD


class Block(nnx.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        self.backend = config.attention
        self.attention = Attention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_TxD, key_start_BxL, key_end_BxL, angles) -> jax.Array:
        q, k, v = self.attention.project(x_TxD, key_start_BxL.shape[0], angles)
        attended = attend(q, k, v, key_start_BxL, key_end_BxL, self.backend)
        x_TxD = constrain(x_TxD + self.attention.merge(attended), "batch", None)
        return constrain(x_TxD + self.mlp(x_TxD), "batch", None)


class ProjectedHead(nnx.Module):
    """Head of the paper: RMSNorm -> Linear -> GELU -> output matrix with bias."""

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        self.norm = _norm(config, rngs=rngs)
        self.projection = _linear(config, config.d_model, config.d_model, rngs=rngs)
        self.output = _linear(config, config.d_model, config.vocab_size, bias=True, rngs=rngs)

    def features(self, x_TxD: jax.Array) -> jax.Array:
        """Returns the input of the output matrix, [T, D]."""
        return jax.nn.gelu(self.projection(self.norm(x_TxD)), approximate=True)


class PlainHead(nnx.Module):
    """Head of Llama: RMSNorm -> output matrix."""

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        self.norm = _norm(config, rngs=rngs)
        self.output = Unbiased(_linear(config, config.d_model, config.vocab_size, rngs=rngs))

    def features(self, x_TxD: jax.Array) -> jax.Array:
        """Returns the input of the output matrix, [T, D]."""
        return self.norm(x_TxD)


class Unbiased(nnx.Module):
    """Output layer without a bias parameter; `bias` is zero, as the loss requires one."""

    def __init__(self, linear: nnx.Linear):
        self.kernel, self.dtype = linear.kernel, linear.dtype

    @property
    def bias(self) -> jax.Array:
        return jnp.zeros(self.kernel.shape[-1], jnp.float32)

    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        return x_BxD @ self.kernel[...].astype(self.dtype)


HEADS = {"projected": ProjectedHead, "plain": PlainHead}


class Transformer(nnx.Module):
    """The language model."""

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        """`config` is `config.model` with `vocab_size` set."""
        self.head_dim = config.d_model // config.num_heads
        self.theta = config.rope_theta
        self.remat = config.remat
        self.layers = config.num_layers
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=_initializer(config.d_model),
            dtype=config.dtype,
            rngs=rngs,
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = stacked_blocks(rngs)
        self.head = HEADS[config.get("head", "projected")](config, rngs=rngs)  # older runs lack the key

    def features(self, tokens_BxL: jax.Array, key_start_BxL: jax.Array, key_end_BxL: jax.Array) -> jax.Array:
        """Returns the features at each position for predicting the next token, [B, L, D].

        Args:
          tokens_BxL: int32.
          key_start_BxL, key_end_BxL: int32; key range of each position, see `attend`.
        """
        positions_L = jnp.arange(tokens_BxL.shape[1])
        angles = rotary_angles(positions_L, self.head_dim, self.theta)
        layer = _apply_block
        if remat.POLICIES[self.remat] is not None:
            layer = nnx.remat(layer, policy=remat.POLICIES[self.remat])
        # In a loop, XLA's GPU compiler copies the residuals of each layer into stacked arrays.
        unroll = self.layers if platform() == "gpu" else 1
        scan = nnx.scan(layer, in_axes=(0, nnx.Carry, None, None, None), out_axes=nnx.Carry, unroll=unroll)
        x_TxD = constrain(self.embedding(tokens_BxL.reshape(-1)), "batch", None)
        x_TxD = scan(self.blocks, x_TxD, key_start_BxL, key_end_BxL, angles)
        return self.head.features(x_TxD).reshape(*tokens_BxL.shape, -1)

    def logits(self, tokens_BxL: jax.Array, key_start_BxL: jax.Array, key_end_BxL: jax.Array) -> jax.Array:
        """Returns the logits for the token after each position, float32 [B, L, V].

        Only for small batches: training uses `features` with a loss that never stores all logits.
        """
        features_BxLxD = self.features(tokens_BxL, key_start_BxL, key_end_BxL)
        return self.head.output(features_BxLxD).astype(jnp.float32)


def _apply_block(block: Block, x_TxD, key_start_BxL, key_end_BxL, angles) -> jax.Array:
    return block(x_TxD, key_start_BxL, key_end_BxL, angles)


def init_params(config: ml_collections.ConfigDict, key: jax.Array) -> dict:
    """Initializes the parameters, a nested dict of float32 arrays. `config` is `config.model`."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(key))))


@functools.cache
def _graph(config: ml_collections.FrozenConfigDict) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def bind(config: ml_collections.ConfigDict, params: dict) -> Transformer:
    """Returns the model with the given parameters, arrays or tracers. `config` is `config.model`."""
    return nnx.merge(_graph(ml_collections.FrozenConfigDict(config)), nnx.State(params))
