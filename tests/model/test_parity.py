"""The model reproduces the logits of the paper's released code."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors import safe_open

from dualsm.model.transformer import bind, init_params
from dualsm.objectives.example import document_spans

FIXTURE = Path(__file__).parents[1] / "data" / "model_parity.safetensors"


def stacked(file, name: str, layers: int) -> np.ndarray:
    return np.stack([file.get_tensor(f"param.encoder.layers.{i}.{name}") for i in range(layers)])


def transposed(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2)


@pytest.fixture(scope="module")
def reference():
    """Config, parameters in our layout, and the tensors of the fixture."""
    with safe_open(FIXTURE, "np") as file:
        meta = {key: float(value) for key, value in file.metadata().items()}
        layers = int(meta["num_layers"])
        get = file.get_tensor

        def kernel(name):
            return {"kernel": transposed(stacked(file, name, layers))}

        def scale(name):
            return {"scale": stacked(file, name, layers)}

        params = {
            "embedding": {"embedding": get("param.embedding.word_embedding.weight")},
            "blocks": {
                "attention": {
                    "norm": scale("attention.pre_norm.weight"),
                    "query": kernel("attention.qkv_proj.weights.0"),
                    "key": kernel("attention.qkv_proj.weights.1"),
                    "value": kernel("attention.qkv_proj.weights.2"),
                    "output": kernel("attention.out_proj.weight"),
                },
                "mlp": {
                    "norm": scale("mlp.pre_norm.weight"),
                    "value": kernel("mlp.up_proj.weights.0"),
                    "gate": kernel("mlp.up_proj.weights.1"),
                    "down": kernel("mlp.down_proj.weight"),
                },
            },
            "head": {
                "norm": {"scale": get("param.classifier.pre_norm.weight")},
                "projection": {"kernel": transposed(get("param.classifier.projection.weight"))},
                "output": {
                    "kernel": transposed(get("param.classifier.emb2vocab.weight")),
                    "bias": get("param.classifier.emb2vocab.bias"),
                },
            },
        }
        tensors = {
            name: get(name) for name in ("input_ids", "doc_ids", "logits_causal", "logits_bidirectional")
        }
    config = ConfigDict(
        {
            "layers": layers,
            "width": int(meta["hidden_size"]),
            "heads": int(meta["num_attention_heads"]),
            "mlp_width": int(meta["intermediate_size"]),
            "vocabulary": int(meta["vocab_size"]),
            "rope_theta": meta["rope_theta"],
            "norm_eps": meta["norm_eps"],
            "dtype": "float32",
            "remat": "none",
            "attention": "xla",
        }
    )
    return config, params, tensors


def test_our_parameters_have_the_shapes_of_the_reference(reference):
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


def test_the_two_views_differ(reference):
    _, _, tensors = reference
    assert np.abs(tensors["logits_causal"] - tensors["logits_bidirectional"]).max() > 0.1
