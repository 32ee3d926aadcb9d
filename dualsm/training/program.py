"""What a run compiles: the state's layout on a mesh, its initialisation and the step.

Kept apart from the loop so that `python -m dualsm.compile` compiles the very same for absent devices.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from dualsm.data.tokenizer import RESERVED_IDS
from dualsm.devices import sharding
from dualsm.model import transformer
from dualsm.model.splash import block_ranges
from dualsm.objectives import mixture
from dualsm.objectives.example import Row, SpecialIds, single_row
from dualsm.objectives.shares import step_shares, trained_objectives
from dualsm.rundir.checkpoint import abstract
from dualsm.training.objective_loss import example_loss
from dualsm.training.optimizer import make_optimizer
from dualsm.training.schedules import learning_rate
from dualsm.training.step import Batch, TrainState, init_state, make_train_step

# By platform. Left alone, the TPU's compiler sends parts of a weight round a ring while it multiplies with
# them, and adds up thin products in main memory: nearly twice the traffic, see docs/scaling.md.
COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}}


class CompiledTrainStep(NamedTuple):
    """What a run compiles.

    Attributes:
      abstract_state: a `TrainState` of shapes, types and layouts.
      init: () -> the state before the first step.
      step: (state, batch) -> (state, sums); takes the old state's memory for the new.
    """

    abstract_state: TrainState
    init: Any
    step: Any


def compile_train_step(
    config: ml_collections.ConfigDict, special: SpecialIds, mesh: Mesh
) -> CompiledTrainStep:
    """The program of a run on the devices of `mesh`.

    Args:
      config: the run's config, vocabulary filled in.
      special: the tokenizer's special ids.
      mesh: from `sharding.make_mesh`.
    """
    names = trained_objectives(config)
    optimizer = make_optimizer(config.optimizer, learning_rate(config.optimizer, config.steps))
    init = functools.partial(init_state, config, optimizer, len(names))
    shapes = jax.eval_shape(init)
    layout = sharding.tree_shardings(mesh, shapes)
    step = make_train_step(config, names, special, optimizer)
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
    """Shapes, types and layouts of a step's batch."""
    layout = jax.sharding.NamedSharding(mesh, sharding.spec("batch"))
    rows, length = config.batch_size, config.seq_len + 1
    shapes = Batch((rows, length), (rows, length), (rows,), (rows,), (rows,))
    return Batch(*(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout) for shape in shapes))


def attended_share(config: ml_collections.ConfigDict, special: SpecialIds, block: int = 1) -> float:
    """Share of the attention scores that a row of one document needs on average, by its key ranges.

    With `block` above 1: that a kernel computes which works in blocks of so many queries and keys.
    """
    names = trained_objectives(config)

    @jax.jit  # op by op it would be a hundred small programs to compile at each start
    def seen_J(keys: jax.Array) -> jax.Array:
        row = single_row(jnp.full(config.seq_len + 1, RESERVED_IDS), jnp.zeros(config.seq_len + 1))
        seen = []
        for objective in mixture.bind(names, config.objectives, special):
            example = jax.vmap(objective, in_axes=(None, 0))(row, keys)
            first, last = block_ranges(example.key_start_L, example.key_end_L, block)
            seen.append((last + 1 - first).mean() * block / config.seq_len)
        return jnp.stack(seen)

    keys = jax.random.split(jax.random.key(0), 16)
    return float(step_shares(config, names).mean(0) @ jax.device_get(seen_J(keys)))


def activation_bytes(config: ml_collections.ConfigDict, special: SpecialIds, rows: int) -> int:
    """Bytes that the forward pass of some rows keeps for the backward pass, by shape and before any layout.

    What does not grow with the rows (the weights themselves) is not counted.
    """
    params = jax.eval_shape(lambda: transformer.init_params(config.model, jax.random.key(0)))
    objectives = mixture.bind(trained_objectives(config)[:1], config.objectives, special)

    def kept(params, tokens_BxL1):
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
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(kept, params, tokens)))

    return size(2 * rows) - size(rows)
