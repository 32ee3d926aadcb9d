"""The model reproduces the logits of the paper's released code."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import default_config
from dualsm.exchange.parameter_sources import load_params
from dualsm.exchange.reference_format import model_settings, parameter_sources
from dualsm.exchange.weight_files import open_weights, read_settings
from dualsm.model.transformer import bind, init_params
from dualsm.objectives.example import document_spans

FIXTURE = Path(__file__).parents[1] / "data" / "model_parity.safetensors"


@pytest.fixture(scope="module")
def reference():
    """Returns the config, the parameters in dualsm's layout, and the other tensors of the fixture."""
    weights = open_weights(FIXTURE)
    ours = {name: info for name, info in weights.tensors.items() if name.startswith("param.")}
    others = {name: weights.read(name) for name in weights.tensors.keys() - ours.keys()}
    sources, _ = parameter_sources(ours)
    config = default_config().model
    config.update(model_settings(sources, ours, read_settings(weights)))
    config.vocab_size = ours["param.embedding.word_embedding.weight"].shape[0]
    config.remat, config.attention = "none", "xla"
    params = load_params(weights, sources, abstract(config), np.arange(config.vocab_size))
    return config, params, others


def abstract(config):
    """Returns the shapes of the parameters on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)


@pytest.mark.parametrize("view", ["causal", "bidirectional"])
def test_logits_equal_the_reference(reference, view):
    config, params, tensors = reference
    tokens_BxL = jnp.asarray(tensors["input_ids"], jnp.int32)
    start_BxL, end_BxL = jax.vmap(document_spans)(jnp.asarray(tensors["doc_ids"], jnp.int32))
    if view == "causal":
        end_BxL = jnp.broadcast_to(jnp.arange(1, tokens_BxL.shape[1] + 1), tokens_BxL.shape)
    logits_BxLxV = bind(config, params).logits(tokens_BxL, start_BxL, end_BxL)
    np.testing.assert_allclose(logits_BxLxV, tensors[f"logits_{view}"], atol=1e-4, rtol=0)


def test_causal_and_bidirectional_logits_differ(reference):
    _, _, tensors = reference
    assert np.abs(tensors["logits_causal"] - tensors["logits_bidirectional"]).max() > 0.1
