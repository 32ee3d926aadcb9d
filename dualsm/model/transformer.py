"""The transformer: blocks of attention and SwiGLU, scanned over layers, and an output head.

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
from dualsm.model import id_ranges, remat
from dualsm.model.attention import attend
from dualsm.model.dropout import dropout, fold_layers
from dualsm.model.head_shapes import head_dim, num_kv_heads
from dualsm.model.layers import initializer, linear, norm
from dualsm.model.output_heads import HEADS
from dualsm.model.rope import Rope, layer_angles, rotate, rotated_layers

# Logit of ids that are never predicted; finite, because padding positions may have these ids as targets of
# weight 0.
MASKED = -1e30
TENSOR_CORE_MULTIPLE = 64  # other matrix sizes halve the speed on GPUs, see docs/performance.md


class Attention(nnx.Module):
    """Grouped-query attention with a norm before or after it; H query heads share Z key and value heads."""

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        d_model, self.head_dim = config.d_model, head_dim(config)
        width, kv_width = (heads * self.head_dim for heads in (config.num_heads, num_kv_heads(config)))
        self.norm_placement, self.qk_norm = config.norm_placement, config.qk_norm
        self.norm = norm(config, rngs=rngs)
        self.query = linear(config, d_model, width, bias=config.qkv_bias, rngs=rngs)
        self.key = linear(config, d_model, kv_width, bias=config.qkv_bias, rngs=rngs)
        self.value = linear(config, d_model, kv_width, bias=config.qkv_bias, rngs=rngs)
        self.output = linear(config, width, d_model, scale=(2 * config.num_layers) ** -0.5, rngs=rngs)
        if self.qk_norm != "none":
            sizes = (width, kv_width) if self.qk_norm == "projection" else (self.head_dim,) * 2
            self.query_norm, self.key_norm = (norm(config, size, rngs=rngs) for size in sizes)

    def project(self, x_TxD: jax.Array, rows: int, angles) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries, [B, L, H, K] with B = `rows`; rotated keys, and values, [B, L, Z, K]."""
        if self.norm_placement == "pre":
            x_TxD = self.norm(x_TxD)
        q, k, v = self.query(x_TxD), self.key(x_TxD), self.value(x_TxD)
        if self.qk_norm == "projection":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (x.reshape(rows, x.shape[0] // rows, -1, self.head_dim) for x in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        return rotate(q, angles), rotate(k, angles), v

    def merge(self, heads_BxLxHxK: jax.Array) -> jax.Array:
        """Applies the output projection to the attended values; returns [T, D]."""
        rows, length, heads, size = heads_BxLxHxK.shape
        x_TxD = self.output(heads_BxLxHxK.reshape(rows * length, heads * size))
        return self.norm(x_TxD) if self.norm_placement == "post" else x_TxD


class MLP(nnx.Module):
    """SwiGLU, down(value(x) * silu(gate(x))), with a norm before or after it."""

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        d_model, d_ff = config.d_model, config.d_ff
        self.norm_placement = config.norm_placement
        self.norm = norm(config, rngs=rngs)
        self.value = linear(config, d_model, d_ff, rngs=rngs)
        self.gate = linear(config, d_model, d_ff, rngs=rngs)
        self.down = linear(config, d_ff, d_model, scale=(2 * config.num_layers) ** -0.5, rngs=rngs)

    def __call__(self, x_TxD: jax.Array) -> jax.Array:
        if self.norm_placement == "post":
            return self.norm(self._swiglu(x_TxD))
        return self._swiglu(self.norm(x_TxD))

    def _swiglu(self, x_TxD: jax.Array) -> jax.Array:
        padding = -self.value.kernel.shape[-1] % TENSOR_CORE_MULTIPLE
        if padding and platform() == "gpu" and divided_by("mlp") == 1:
            return self._with_padding(x_TxD, padding)
        return self.down(self.value(x_TxD) * jax.nn.silu(self.gate(x_TxD)))

    def _with_padding(self, x_TxD: jax.Array, padding: int) -> jax.Array:
        """Computes SwiGLU with matrices zero-padded along F."""
        kernels = (linear.kernel[...].astype(x_TxD.dtype) for linear in (self.value, self.gate, self.down))
        value_DxF, gate_DxF, down_FxD = kernels
        value_DxF, gate_DxF = (jnp.pad(x, [(0, 0), (0, padding)]) for x in (value_DxF, gate_DxF))
        down_FxD = jnp.pad(down_FxD, [(0, padding), (0, 0)])
        return ((x_TxD @ value_DxF) * jax.nn.silu(x_TxD @ gate_DxF)) @ down_FxD


class Block(nnx.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        self.backend, self.dropout = config.attention, config.dropout
        self.attention = Attention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_TxD, key_start_BxL, key_end_BxL, angles, keys_2xBx2=(None, None)) -> jax.Array:
        q, k, v = self.attention.project(x_TxD, key_start_BxL.shape[0], angles)
        attended = attend(q, k, v, key_start_BxL, key_end_BxL, self.backend)
        attended_TxD = dropout(self.attention.merge(attended), keys_2xBx2[0], self.dropout)
        x_TxD = constrain(x_TxD + attended_TxD, "batch", None)
        return constrain(x_TxD + dropout(self.mlp(x_TxD), keys_2xBx2[1], self.dropout), "batch", None)


class Transformer(nnx.Module):
    """The language model."""

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        """`config` is `config.model` with `vocab_size` set."""
        self.head_dim = head_dim(config)
        self.rope = Rope(self.head_dim, config.rope_theta, **config.rope_scaling)
        self.no_rope_layer_interval = config.no_rope_layer_interval
        self.remat = config.remat
        self.dropout = config.dropout
        self.layers = config.num_layers
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=initializer(config.d_model),
            dtype=config.dtype,
            rngs=rngs,
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = stacked_blocks(rngs)
        self.head = HEADS[config.head](config, self.embedding, rngs=rngs)
        self.never_predicted = config.never_predicted

    @property
    def rotated_N(self) -> jax.Array | None:
        """Returns True for each layer with a rotary embedding; None if all layers have it."""
        return rotated_layers(self.layers, self.no_rope_layer_interval)

    def features(
        self,
        tokens_BxL: jax.Array,
        key_start_BxL: jax.Array,
        key_end_BxL: jax.Array,
        dropout_keys_Bx2: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the features at each position for predicting the next token, [B, L, D].

        Args:
          tokens_BxL: int32.
          key_start_BxL, key_end_BxL: int32; key range of each position, see `attend`.
          dropout_keys_Bx2: uint32; one key per row; None: no dropout.
        """
        angles = self.rope.angles(jnp.arange(tokens_BxL.shape[1]))
        layer = _apply_block
        if remat.POLICIES[self.remat] is not None:
            layer = nnx.remat(layer, policy=remat.POLICIES[self.remat])
        # In a loop, XLA's GPU compiler copies the residuals of each layer into stacked arrays.
        unroll = self.layers if platform() == "gpu" else 1
        axes, keys = (0, 0, nnx.Carry, None, None, None), ()
        x_TxD = self.embedding(tokens_BxL.reshape(-1))
        if dropout_keys_Bx2 is not None:
            embedding_keys_Bx2, keys_Nx2xBx2 = fold_layers(dropout_keys_Bx2, self.layers)
            x_TxD = dropout(x_TxD, embedding_keys_Bx2, self.dropout)
            axes, keys = (*axes, 0), (keys_Nx2xBx2,)
        scan = nnx.scan(layer, in_axes=axes, out_axes=nnx.Carry, unroll=unroll)
        x_TxD = constrain(x_TxD, "batch", None)
        x_TxD = scan(self.blocks, self.rotated_N, x_TxD, key_start_BxL, key_end_BxL, angles, *keys)
        return self.head.features(x_TxD).reshape(*tokens_BxL.shape, -1)

    def logits(self, tokens_BxL: jax.Array, key_start_BxL: jax.Array, key_end_BxL: jax.Array) -> jax.Array:
        """Returns the logits for the token after each position, float32 [B, L, V].

        Only for small batches: training uses `features` with a loss that never stores all logits.
        """
        return self.output_logits(self.features(tokens_BxL, key_start_BxL, key_end_BxL))

    def output_logits(self, features_BxD: jax.Array) -> jax.Array:
        """Returns the logits for given features, float32 [..., V]."""
        logits_BxV = self.head.output(features_BxD).astype(jnp.float32)
        return jnp.where(self._is_masked(), MASKED, logits_BxV) if self.never_predicted else logits_BxV

    def output_bias(self) -> jax.Array:
        """Returns the bias of the logits, [V]; it masks the ids of `config.never_predicted`."""
        bias_V = self.head.output.bias[...]
        return jnp.where(self._is_masked(), MASKED, bias_V) if self.never_predicted else bias_V

    def _is_masked(self) -> jax.Array:
        return id_ranges.contains(self.never_predicted, jnp.arange(self.embedding.num_embeddings))


def _apply_block(block: Block, is_rotated, x_TxD, key_start_BxL, key_end_BxL, angles, *keys) -> jax.Array:
    return block(x_TxD, key_start_BxL, key_end_BxL, layer_angles(angles, is_rotated), *keys)


def init_params(config: ml_collections.ConfigDict, key: jax.Array) -> dict:
    """Initializes the parameters, a nested dict of float32 arrays. `config` is `config.model`."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(key))))


@functools.cache
def _graph(config: ml_collections.FrozenConfigDict) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def bind(config: ml_collections.ConfigDict, params: dict) -> Transformer:
    """Returns the model with the given parameters, arrays or tracers. `config` is `config.model`."""
    return nnx.merge(_graph(ml_collections.FrozenConfigDict(config)), nnx.State(params))
