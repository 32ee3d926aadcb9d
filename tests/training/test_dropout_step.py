"""Dropout in the train step."""

import jax
import jax.numpy as jnp

from dualsm.config import default_config
from dualsm.devices import sharding

from .conftest import Micro
from .test_step import assert_trees_close

DROPOUT = {"model.dropout": 0.3, "model.num_layers": 1, "optimizer.name": "adamw"}
DROPOUT |= {"mixture.causal": 1.0, "mixture.prefix": 0.0, "mixture.masked_diffusion": 0.0}


def test_the_mask_does_not_depend_on_sharding_or_accumulation():
    config = default_config().mesh
    config.update({"data": 2, "fsdp": 2})
    mesh = sharding.make_mesh(config, jax.devices()[:4])
    micro = Micro(**DROPOUT, gradient_accumulation_steps=2)
    places = sharding.tree_shardings(mesh, jax.eval_shape(micro.init))
    with jax.set_mesh(mesh):
        state = jax.jit(micro.init, out_shardings=places)()
        batch = jax.tree.map(lambda rows: sharding.shard_batch(mesh, rows), micro.batch())
        state, _ = jax.jit(micro.step, out_shardings=(places, None))(state, batch)
    expected = Micro(**DROPOUT).run()
    assert_trees_close(state.metrics, expected.metrics, rtol=1e-4)
    assert_trees_close(state.params, expected.params, atol=2e-5)


def test_each_step_has_its_own_mask():
    micro = Micro(**DROPOUT)
    state, step = jax.jit(micro.init)(), jax.jit(micro.step)
    losses = [float(step(state._replace(step=jnp.int32(s)), micro.batch())[1].loss) for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
