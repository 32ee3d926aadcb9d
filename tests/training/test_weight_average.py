"""The moving average of the weights in the train step."""

import jax
import numpy as np
import pytest

from dualsm.config import check_config
from dualsm.devices import sharding
from dualsm.process.errors import UserError
from dualsm.training.weight_average import update_average
from tests.micro import micro_config

from .conftest import Micro

EMA = {"ema.decay": 0.7, "ema.start": 1, "ema.every": 2, "model.num_layers": 1, "optimizer.name": "adamw"}
EMA |= {"mixture.causal": 1.0, "mixture.prefix": 0.0, "mixture.masked_diffusion": 0.0}


@pytest.mark.parametrize(("start", "every"), [(0, 1), (3, 1), (2, 4)])
def test_the_average_equals_its_recursion_in_float64(start, every):
    config = micro_config().ema
    config.decay, config.start, config.every = 0.9, start, every
    update = jax.jit(lambda *a: update_average(config, *a))
    rng = np.random.default_rng(0)
    average = expected = rng.normal(size=7).astype(np.float32)
    for step in range(1, 40):
        params = rng.normal(size=7).astype(np.float32)
        average = update({"w": average}, {"w": params}, np.int32(step))["w"]
        if step <= start:
            expected = params.astype(np.float64)
            np.testing.assert_array_equal(average, params)
        elif step % every == 0:
            expected = 0.9 * expected + 0.1 * params.astype(np.float64)
        np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)


def test_average_is_updated_in_the_step_and_sharded_like_the_weights():
    config = micro_config().mesh
    config.update({"data": 2, "fsdp": 2})
    mesh = sharding.make_mesh(config, jax.devices()[:4])
    micro = Micro(**EMA)
    places = sharding.tree_shardings(mesh, jax.eval_shape(micro.init))
    assert places.ema == places.params
    with jax.set_mesh(mesh):
        state = jax.jit(micro.init, out_shardings=places)()
        step = jax.jit(micro.step, out_shardings=(places, None))
        weights = []
        for s in range(4):
            batch = jax.tree.map(lambda rows: sharding.shard_batch(mesh, rows), micro.batch(s))
            state, _ = step(state, batch)
            weights.append(jax.tree.map(lambda p: np.asarray(p, np.float64), state.params))
    second = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, weights[0], weights[1])
    fourth = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, second, weights[3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, fourth)


def test_validation_of_a_missing_average_is_rejected():
    config = micro_config()
    config.valid.parameters = "both"
    with pytest.raises(UserError, match="config.valid.parameters=both needs a moving average"):
        check_config(config)
