"""Optimizers: updates equal those of the paper's released code; clipping, sharding, registration."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from dualsm.config import default_config
from dualsm.devices import sharding
from dualsm.model.transformer import init_params
from dualsm.optimizers.optimizer import OPTIMIZERS, Optimizer, make_optimizer
from dualsm.process.errors import UserError

FIXTURE = Path(__file__).parents[1] / "data" / "muon_parity.safetensors"


def as_params(tensors: dict, prefix: str) -> dict:
    """Returns the fixture's tensors under paths of the model's parameters."""
    return {
        "blocks": {"a": {"kernel": jnp.asarray(tensors[prefix + "W"])}},
        "head": {
            "projection": {"kernel": jnp.asarray(tensors[prefix + "W2"])},
            "output": {"bias": jnp.asarray(tensors[prefix + "b"])},
        },
        "embedding": {"embedding": jnp.asarray(tensors[prefix + "E"])},
    }


def relative_error(ours, theirs) -> float:
    return float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))


def test_five_updates_equal_the_reference():
    tensors = load_file(FIXTURE)
    config = default_config().optimizer
    optimizer = make_optimizer(config, lambda _: 7e-3, 1)
    params = as_params(tensors, "init.")
    state = optimizer.init(params)
    for step in range(5):
        updates, state = optimizer.update(as_params(tensors, f"grad{step}."), state, params)
        params = optax.apply_updates(params, updates)
        expected = as_params(tensors, f"after{step}.")
        errors = jax.tree.map(relative_error, params, expected)
        assert max(jax.tree.leaves(errors)) < 2e-3, errors


def test_tied_embeddings_biases_and_norms_are_updated_by_adamw():
    model = default_config().model
    model.num_layers, model.d_model, model.num_heads, model.d_ff, model.vocab_size = 2, 16, 2, 24, 64
    model.tie_word_embeddings = model.qkv_bias = True
    model.qk_norm, model.head = "head", "projected"
    params = init_params(model, jax.random.key(0))
    updates = []
    for name in ("muon", "adamw"):
        config = default_config().optimizer
        config.name, config.weight_decay = name, 0.0
        optimizer = make_optimizer(config, lambda _: 1e-2, 1)
        grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
        updates.append(optimizer.update(grads, optimizer.init(params), params)[0])
    same = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b)), *updates)
    paths = {jax.tree_util.keystr(path, simple=True, separator="/"): value
             for path, value in jax.tree_util.tree_flatten_with_path(same)[0]}  # fmt: skip
    by_muon = {path for path, is_same in paths.items() if not is_same}
    assert by_muon == {
        "head/projection/kernel",
        *(f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "output")),
        *(f"blocks/mlp/{name}/kernel" for name in ("value", "gate", "down")),
    }
    assert {"embedding/embedding", "head/output/bias", "blocks/attention/key_norm/scale"} < paths.keys()


def test_stacked_matrices_are_updated_independently():
    key = jax.random.key(0)
    stack_NxAxB = jax.random.normal(key, (3, 8, 12))
    grads_NxAxB = jax.random.normal(jax.random.fold_in(key, 1), stack_NxAxB.shape)
    optimizer = make_optimizer(default_config().optimizer, lambda _: 1e-2, 1)

    def update(weights, grads):
        params, grads = ({"blocks": {"m": {"kernel": w}}} for w in (weights, grads))
        return optimizer.update(grads, optimizer.init(params), params)[0]["blocks"]["m"]["kernel"]

    together = update(stack_NxAxB, grads_NxAxB)
    for i in range(3):
        np.testing.assert_allclose(together[i], update(stack_NxAxB[i], grads_NxAxB[i]), atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_clipping_limits_the_gradient_norm(name):
    config = default_config().optimizer
    config.name, config.max_grad_norm, config.weight_decay = name, 1.0, 0.0
    params = {"embedding": {"embedding": jnp.ones((4, 4))}}
    optimizer = make_optimizer(config, lambda _: 1.0, 1)
    # Adam's first moment depends on the scale of the gradient; its first update does not.
    _, state = optimizer.update(jax.tree.map(lambda p: 100 * p, params), optimizer.init(params), params)
    first_moments = [m for m in jax.tree.leaves(state) if m.shape == (4, 4)]
    assert max(float(jnp.linalg.norm(m)) for m in first_moments) < 0.2


def test_state_without_a_sharding_rule_is_an_error():
    """A matrix in the optimizer state that matches no parameter is not replicated silently."""
    config = default_config().mesh
    config.data = -1
    mesh = sharding.make_mesh(config, jax.devices())
    matrix, vector = jnp.ones((2, 4)), jnp.ones(3)
    assert sharding.tree_shardings(mesh, {"coefficients": vector})["coefficients"].is_fully_replicated
    with pytest.raises(UserError, match=r"no sharding rule matches preconditioner of shape \(2, 4\)"):
        sharding.tree_shardings(mesh, {"preconditioner": matrix})
    with pytest.raises(UserError, match=r"no sharding rule matches params/gain of shape \(3,\)"):
        sharding.tree_shardings(mesh, {"params": {"gain": vector}})


def test_new_optimizer_needs_one_row_in_the_table(monkeypatch):
    config = default_config().optimizer
    monkeypatch.setitem(OPTIMIZERS, "sgd", Optimizer(lambda config, schedule: optax.sgd(schedule)))
    config.name, config.max_grad_norm = "sgd", 0.0
    params = {"weight": jnp.ones(2)}
    optimizer = make_optimizer(config, lambda _: 0.5, 1)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["weight"], [-0.5, -0.5])
