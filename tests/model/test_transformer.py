"""The transformer: remat policies, dtypes, padding, and the FLOPs formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.model.flops import matrix_parameters, train_flops
from dualsm.model.remat import POLICIES
from dualsm.model.transformer import bind, init_params
from tests.micro import micro_config


@pytest.fixture(scope="module")
def config():
    config = micro_config().model
    config.vocab_size = 128
    return config


def loss_of(config):
    """Returns a scalar function of all features, and its arguments besides the parameters."""
    tokens_BxL = jax.random.randint(jax.random.key(1), (2, 16), 0, 128)
    start_BxL = jnp.zeros((2, 16), jnp.int32)
    end_BxL = jnp.broadcast_to(jnp.arange(1, 17), (2, 16))
    return lambda params: (bind(config, params).features(tokens_BxL, start_BxL, end_BxL) ** 2).sum()


def with_remat(config, remat):
    config = config.copy_and_resolve_references()
    config.remat = remat
    return config


@pytest.mark.parametrize("remat", POLICIES)
def test_remat_does_not_change_gradients(config, remat):
    params = init_params(config, jax.random.key(0))
    expected = jax.grad(loss_of(with_remat(config, "none")))(params)
    ours = jax.grad(loss_of(with_remat(config, remat)))(params)
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_remat_recomputes_unsaved_results(config):
    """Counts matrix products in the compiled backward pass: policies that save less compute more."""
    params = init_params(config, jax.random.key(0))

    def products(remat):
        text = jax.jit(jax.grad(loss_of(with_remat(config, remat)))).lower(params).compile().as_text()
        return text.count(" dot(") + text.count("__onednn$matmul")

    assert products("none") < products("matmuls") < products("full")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padded_matrices_and_unrolled_layers_do_not_change_the_result(config, dtype, monkeypatch):
    config = config.copy_and_resolve_references()
    config.d_ff, config.dtype = 50, dtype
    params = init_params(config, jax.random.key(0))
    expected = jax.value_and_grad(loss_of(config))(params)
    monkeypatch.setattr("dualsm.model.transformer.platform", lambda: "gpu")
    step = jax.value_and_grad(loss_of(config))
    jaxpr = str(jax.make_jaxpr(step)(params))
    assert "pad[" in jaxpr and "unroll=2" in jaxpr
    ours = step(params)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, expected)
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        difference, norm = np.linalg.norm(np.ravel(a - b)), np.linalg.norm(np.ravel(b))
        assert difference <= (1e-5 if dtype == "float32" else 0.03) * norm


def test_bfloat16_computes_in_bfloat16_over_float32_weights(config):
    config = config.copy_and_resolve_references()
    params = init_params(config, jax.random.key(0))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact = loss_of(config)(params)
    config.dtype = "bfloat16"
    tokens, zeros, ends = jnp.ones((1, 4), jnp.int32), jnp.zeros((1, 4), jnp.int32), jnp.full((1, 4), 4)
    assert bind(config, params).features(tokens, zeros, ends).dtype == jnp.bfloat16
    assert bind(config, params).logits(tokens, zeros, ends).dtype == jnp.float32
    assert float(loss_of(config)(params)) == pytest.approx(float(exact), rel=0.02)
    assert {g.dtype for g in jax.tree.leaves(jax.grad(loss_of(config))(params))} == {jnp.dtype("float32")}


def test_flops_formula_agrees_with_xla_for_one_layer(config):
    """One layer, because XLA counts the body of a scan once. XLA also counts the softmax, a few percent."""
    config = config.copy_and_resolve_references()
    config.num_layers, config.d_model, config.d_ff, config.remat = 1, 64, 192, "none"
    params = init_params(config, jax.random.key(0))
    rows, length = 2, 32
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, 128)
    zeros = jnp.zeros((rows, length), jnp.int32)

    def forward(params):
        return bind(config, params).logits(tokens, zeros, zeros + length)

    analysis = jax.jit(forward).lower(params).compile().cost_analysis()
    counted = rows * train_flops(config, length, attended=1.0) / 3
    assert counted == pytest.approx(analysis["flops"], rel=0.08)
    assert matrix_parameters(config) < sum(p.size for p in jax.tree.leaves(params))
