"""Dropout: the mask, its positions in the model, and recomputation in the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dualsm.model.attention import attend
from dualsm.model.dropout import dropout, fold_layers
from dualsm.model.transformer import bind, init_params
from dualsm.objectives.mixture import row_keys
from tests.micro import micro_config

KEYS_Bx2 = jax.random.key_data(row_keys(jax.random.key(3), 4))


def model_config(**changes):
    config = micro_config().model
    config.vocab_size, config.num_layers, config.d_model, config.d_ff = 32, 2, 16, 24
    config.update(changes)
    return config


def inputs():
    tokens_BxL = np.random.default_rng(0).integers(0, 32, (4, 8))
    end_BxL = np.tile(np.arange(1, 9), (4, 1))
    return jnp.asarray(tokens_BxL), jnp.zeros((4, 8), jnp.int32), jnp.asarray(end_BxL)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_mask_has_the_rate_and_keeps_the_mean(rate):
    kept = np.asarray(dropout(jnp.ones((4 * 256, 64)), KEYS_Bx2, rate))
    assert set(np.unique(kept)) == {0, np.float32(1 / (1 - rate))}
    error = 4 * (rate * (1 - rate) / kept.size) ** 0.5
    assert np.mean(kept == 0) == pytest.approx(rate, abs=error)
    by_row = (kept == 0).reshape(4, -1)
    assert np.abs(np.corrcoef(by_row) - np.eye(4)).max() < 5 / by_row.shape[1] ** 0.5


def test_the_mask_of_a_row_does_not_depend_on_the_other_rows():
    x_TxD = jnp.ones((4 * 8, 16))
    np.testing.assert_array_equal(jax.random.key_data(row_keys(jax.random.key(3), 9))[:4], KEYS_Bx2)
    whole = dropout(x_TxD, KEYS_Bx2, 0.5)
    np.testing.assert_array_equal(dropout(x_TxD[8:16], KEYS_Bx2[1:2], 0.5), whole[8:16])


def test_every_layer_and_position_has_its_own_keys():
    embedding, layers = fold_layers(KEYS_Bx2, 3)
    every = np.concatenate([embedding[None], layers.reshape(6, 4, 2)]).reshape(-1, 2)
    assert len(np.unique(every, axis=0)) == 7 * 4


def test_without_keys_there_is_no_dropout():
    plain, dropped = model_config(), model_config(dropout=0.5)
    params = init_params(plain, jax.random.key(0))
    expected = bind(plain, params).features(*inputs())
    np.testing.assert_array_equal(bind(dropped, params).features(*inputs()), expected)
    assert (bind(dropped, params).features(*inputs(), KEYS_Bx2) != expected).any()


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_embeddings_attention_and_mlp_are_dropped(part):
    """Sets the output matrix of the other part to zero, so that the residual stream is easy to compute."""
    config = model_config(dropout=0.5, num_layers=1, head="plain")
    params = init_params(config, jax.random.key(0))
    other, matrix = ("mlp", "down") if part == "attention" else ("attention", "output")
    params["blocks"][other][matrix] = jax.tree.map(jnp.zeros_like, params["blocks"][other][matrix])
    model = bind(config, params)
    embedding_keys_Bx2, keys_Nx2xBx2 = fold_layers(KEYS_Bx2, 1)
    x_TxD = dropout(model.embedding(inputs()[0].reshape(-1)), embedding_keys_Bx2, 0.5)
    added_TxD = dropout(residual(model, part, x_TxD), keys_Nx2xBx2[0, int(part == "mlp")], 0.5)
    found_BxLxD = model.features(*inputs(), KEYS_Bx2)
    np.testing.assert_allclose(found_BxLxD.reshape(32, 16), model.head.features(x_TxD + added_TxD), atol=1e-5)


def residual(model, part: str, x_TxD):
    """Returns the output of the only layer's attention or MLP, without dropout."""
    graph, state = nnx.split(model.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
    if part == "mlp":
        return block.mlp(x_TxD)
    _, start_BxL, end_BxL = inputs()
    angles = model.rope.angles(jnp.arange(8))
    return block.attention.merge(
        attend(*block.attention.project(x_TxD, 4, angles), start_BxL, end_BxL, "xla")
    )


@pytest.mark.parametrize("remat", ["full", "matmuls"])
def test_backward_pass_recomputes_the_same_mask(remat):
    params = init_params(model_config(), jax.random.key(0))

    def gradient(policy):
        config = model_config(dropout=0.5, remat=policy)
        total = jax.jit(lambda params: (bind(config, params).features(*inputs(), KEYS_Bx2) ** 2).sum())
        return jax.grad(total)(params)

    for a, b in zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(gradient("none")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
