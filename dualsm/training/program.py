"""The compiled functions of a run: initialization of the train state and the train step.

The training loop and `python -m dualsm.compile`, which compiles for absent devices, share these functions.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dualsm.data.tokenizer import RESERVED_IDS
from dualsm.devices import sharding
from dualsm.model import transformer
from dualsm.model.splash import block_ranges
from dualsm.objectives import mixture
from dualsm.objectives.example import Row, SpecialIds, single_row
from dualsm.objectives.pairs import bind_members, members_of
from dualsm.objectives.shares import shares_by_source, trained_entries
from dualsm.optimizers.optimizer import make_optimizer
from dualsm.optimizers.schedules import learning_rate
from dualsm.rundir.checkpoint import abstract
from dualsm.training.objective_loss import example_loss
from dualsm.training.step import Batch, TrainState, init_state, make_train_step

# By platform. By default the TPU compiler overlaps the all-gather of a sharded weight with the matmul
# ("windowed einsum") and accumulates narrow products in HBM, which nearly doubles the traffic; see
# docs/scaling.md.
COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}}


class CompiledTrainStep(NamedTuple):
    """The functions of a run, jitted.

    Attributes:
      abstract_state: a `TrainState` of shapes, dtypes and shardings.
      init: function () -> state before the first step.
      step: function (state, batch) -> (state, step metrics); donates the state.
    """

    abstract_state: TrainState
    init: Any
    step: Any


def compile_train_step(
    config: ml_collections.ConfigDict, special: SpecialIds, mesh: Mesh
) -> CompiledTrainStep:
    """Returns the jitted functions of a run on the devices of `mesh`.

    Args:
      config: the run's config, with `model.vocab_size` filled in.
      special: the tokenizer's special ids.
      mesh: from `sharding.make_mesh`.
    """
    entries = trained_entries(config)
    optimizer = make_optimizer(config.optimizer, learning_rate(config.optimizer, config.steps), config.steps)
    init = functools.partial(init_state, config, optimizer, len(members_of(entries)))
    shapes = jax.eval_shape(init)
    layout = sharding.tree_shardings(mesh, shapes)
    step = make_train_step(config, entries, special, optimizer)
    options = COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)
    return CompiledTrainStep(
        abstract_state=abstract(shapes, layout),
        init=jax.jit(init, out_shardings=layout),
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(layout, sharding.replicated(mesh)),
            compiler_options=options,
        ),
    )


def batch_shapes(config: ml_collections.ConfigDict, mesh: Mesh) -> Batch:
    """Returns the shapes, dtypes and shardings of a batch."""
    layout = jax.sharding.NamedSharding(mesh, sharding.spec("batch"))
    rows, length = config.batch_size, config.seq_len + 1
    shapes = Batch((rows, length), (rows, length), (rows,), (rows,), (rows,))
    return Batch(*(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout) for shape in shapes))


def attended_shares(config: ml_collections.ConfigDict, special: SpecialIds, block: int = 1) -> np.ndarray:
    """Returns the fraction of the L x L attention scores that the key ranges of a row require.

    The mean is over 16 corruptions of a row with a single document.

    Args:
      config: the run's config.
      special: the tokenizer's special ids.
      block: block size of the attention kernel in queries and keys: a kernel computes whole blocks.

    Returns:
      One fraction per member of the mixture, [J].
    """
    members = members_of(trained_entries(config))

    @jax.jit  # unjitted, about a hundred small programs would be compiled
    def seen_J(keys: jax.Array) -> jax.Array:
        row = single_row(jnp.full(config.seq_len + 1, RESERVED_IDS), jnp.zeros(config.seq_len + 1))
        seen = []
        for objective in bind_members(members, special):
            example = jax.vmap(objective, in_axes=(None, 0))(row, keys)
            first, last = block_ranges(example.key_start_L, example.key_end_L, block)
            seen.append((last + 1 - first).mean() * block / config.seq_len)
        return jnp.stack(seen)

    return jax.device_get(seen_J(jax.random.split(jax.random.key(0), 16)))


def attended_share(config: ml_collections.ConfigDict, special: SpecialIds, block: int = 1) -> float:
    """Returns the mean of `attended_shares`, weighted with the mixture."""
    parts = shares_by_source(config)
    share_E = np.concatenate([part.share_SxE for part in parts], 1).mean(0)
    rows_E = [entry.rows for part in parts for entry in part.entries]
    return float(np.repeat(share_E / rows_E, rows_E) @ attended_shares(config, special, block))


def activation_bytes(config: ml_collections.ConfigDict, special: SpecialIds, rows: int) -> int:
    """Returns the bytes that the forward pass of `rows` rows stores for the backward pass.

    The estimate is computed from shapes, without padding. Arrays whose size does not depend on the number of
    rows, such as the weights, are excluded.
    """
    params = jax.eval_shape(lambda: transformer.init_params(config.model, jax.random.key(0)))
    objectives = bind_members(members_of(trained_entries(config))[:1], special)

    def residuals(params, tokens_BxL1):
        size = len(tokens_BxL1)
        zeros_B = jnp.zeros(size, jnp.int32)
        row = Row(tokens_BxL1, jnp.zeros_like(tokens_BxL1), zeros_B, zeros_B + 1, jnp.zeros(size))
        keys_B = mixture.row_keys(jax.random.key(0), size)
        example = mixture.make_examples(objectives, row, zeros_B, keys_B)

        def loss(params):
            return example_loss(transformer.bind(config.model, params), example, config.loss.chunk_size)[0]

        return jax.vjp(loss, params)[1]

    def size(rows: int) -> int:
        tokens = jax.ShapeDtypeStruct((rows, config.seq_len + 1), jnp.int32)
        arrays = jax.tree.leaves(jax.eval_shape(residuals, params, tokens))
        return sum(x.size * x.dtype.itemsize for x in arrays)

    return size(2 * rows) - size(rows)
