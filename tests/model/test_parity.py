"""The model reproduces the logits of the paper's released code."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import default_config
from dualsm.exchange.reference_format import model_settings, to_params
from dualsm.exchange.weight_files import read_settings, read_weights
from dualsm.model.transformer import bind, init_params
from dualsm.objectives.example import document_spans

FIXTURE = Path(__file__).parents[1] / "data" / "model_parity.safetensors"


@pytest.fixture(scope="module")
def reference():
    """Returns the config, the parameters in dualsm's layout, and the other tensors of the fixture."""
    tensors, metadata = read_weights(FIXTURE)
    others = {name: tensors.pop(name) for name in [n for n in tensors if not n.startswith("param.")]}
    params = to_params(tensors)
    config = default_config().model
    config.update(model_settings(params, read_settings(FIXTURE, metadata)))
    config.vocab_size = len(params["embedding"]["embedding"])
    config.remat, config.attention = "none", "xla"
    return config, params, others


def test_parameters_have_the_shapes_of_the_reference(reference):
    config, params, _ = reference
    ours = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert jax.tree.map(lambda p: p.shape, ours) == jax.tree.map(lambda p: p.shape, params)


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
