"""Dropout in the train step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import default_config
from dualsm.devices import sharding
from dualsm.objectives import mixture
from dualsm.training import step

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


def test_each_step_and_each_seed_has_its_own_mask():
    """The parameters and the batch are the same."""
    state, batch = jax.jit(Micro(**DROPOUT).init)(), Micro(**DROPOUT).batch()
    first, second = (jax.jit(Micro(**DROPOUT, seed=seed).step) for seed in (0, 1))
    cases = ((first, 0), (first, 0), (first, 1), (second, 0))
    losses = [float(step(state._replace(step=jnp.int32(s)), batch)[1].loss) for step, s in cases]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_keys_of_dropout_are_not_those_of_the_corruption(monkeypatch):
    """Equal keys would make the dropped positions depend on the masked tokens."""
    found = {}

    def record(params, rows):
        found["keys"] = np.asarray(rows.dropout_keys_Bx2)
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "make_gradient_function", lambda config: record)
    micro = Micro(**DROPOUT)
    with pytest.raises(KeyboardInterrupt):
        micro.step(micro.init(), micro.batch())
    key = jax.random.fold_in(jax.random.key(micro.config.seed), 0)
    corruption_Bx2 = jax.random.key_data(mixture.row_keys(key, len(found["keys"])))
    keys = {tuple(key) for keys in (found["keys"], corruption_Bx2) for key in keys.tolist()}
    assert len(keys) == 2 * len(corruption_Bx2)
