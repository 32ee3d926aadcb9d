"""The plain output head: parameters, logits, loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.data.tokenizer import SpecialIds
from dualsm.model.output_heads import HEADS
from dualsm.model.transformer import bind, init_params
from dualsm.objectives.example import single_row
from dualsm.training.objective_loss import objective_loss
from tests.micro import micro_config


def config_with(head: str):
    config = micro_config().model
    config.vocab_size, config.head = 128, head
    return config


@pytest.fixture(scope="module")
def rows():
    tokens_L1 = jax.random.randint(jax.random.key(1), (17,), 16, 128)
    return jax.tree.map(lambda a: jnp.asarray(a)[None], single_row(tokens_L1, jnp.zeros(17, jnp.int32)))


def test_the_plain_head_has_one_scale_and_one_matrix():
    params = init_params(config_with("plain"), jax.random.key(0))["head"]
    assert jax.tree.map(jnp.shape, params) == {"norm": {"scale": (32,)}, "output": {"kernel": (32, 128)}}


def test_logits_are_the_normalized_features_times_the_matrix():
    config = config_with("plain")
    model = bind(config, init_params(config, jax.random.key(0)))
    x_TxD = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    normalised = x_TxD / np.sqrt((x_TxD**2).mean(1, keepdims=True) + config.norm_eps)
    expected = normalised * np.asarray(model.head.norm.scale[...]) @ np.asarray(model.head.output.kernel[...])
    np.testing.assert_allclose(model.head.output(model.head.features(x_TxD)), expected, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_loss_equals_that_of_the_logits(head, rows):
    config = config_with(head)
    params = init_params(config, jax.random.key(0))
    special = SpecialIds(vocab_size=128)
    total, count, _ = objective_loss("causal", config, special)(params, rows, jax.random.key(0))
    tokens_BxL = rows.tokens_L1[:, :-1]
    end_BxL = jnp.arange(1, 17)[None]
    logits = bind(config, params).logits(tokens_BxL, jnp.zeros_like(end_BxL), end_BxL)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.tokens_L1[:, 1:, None], -1)
    assert float(total / count) == pytest.approx(float(-log_p.mean()), abs=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_of_a_head_has_a_gradient(head, rows):
    config = config_with(head)
    params = init_params(config, jax.random.key(0))
    loss = objective_loss("causal", config, SpecialIds(vocab_size=128))
    gradients = jax.grad(lambda p: loss(p, rows, jax.random.key(0))[0])(params)
    assert all(float(abs(g).max()) > 0 for g in jax.tree.leaves(gradients["head"]))
