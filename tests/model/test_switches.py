"""Architecture switches, alone and together: logits, gradients, caches, FLOPs."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import default_config
from dualsm.generation.autoregressive import forward_prompt, forward_with_cache
from dualsm.model.flops import matrix_parameters, train_flops
from dualsm.model.remat import POLICIES
from dualsm.model.transformer import bind, init_params
from dualsm.training.objective_loss import example_loss
from tests.objectives.conftest import batch, packed, rewritten

from . import numpy_model

LENGTH, VOCABULARY = 24, 64
LLAMA3 = {
    "rope_scaling.name": "llama3",
    "rope_scaling.factor": 4.0,
    "rope_scaling.low_freq_factor": 1.0,
    "rope_scaling.high_freq_factor": 4.0,
    "rope_scaling.original_max_position_embeddings": 64,
}
SWITCHES = {
    "plain head": {"head": "plain"},
    "grouped queries": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1},
    "wide heads": {"head_dim": 12},
    "tied": {"tie_word_embeddings": True},
    "tied plain": {"tie_word_embeddings": True, "head": "plain"},
    "QKV bias": {"qkv_bias": True},
    "norm of heads": {"qk_norm": "head"},
    "norm of projections": {"qk_norm": "projection", "num_kv_heads": 2},
    "norms of outputs": {"norm_placement": "post"},
    "llama3": LLAMA3,
    "layers without RoPE": {"no_rope_layer_interval": 2},
}
ALL = {
    "head": "plain", "num_kv_heads": 2, "head_dim": 12, "tie_word_embeddings": True, "qkv_bias": True,
    "qk_norm": "projection", "norm_placement": "post", "no_rope_layer_interval": 2, **LLAMA3,
}  # fmt: skip


def config_with(switches: dict):
    config = default_config().model
    config.num_layers, config.d_model, config.num_heads, config.d_ff = 2, 32, 4, 24
    config.vocab_size, config.rope_theta, config.norm_eps = VOCABULARY, 100.0, 1e-3
    config.remat, config.attention = "none", "xla"
    config.update_from_flattened_dict(switches)
    return config


def random_params(config) -> dict:
    """Returns random parameters that depend on their name only, so that two configs can share them."""

    def draw(path, leaf):
        rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        large = rng.normal(0, 0.25, (2, 64, 64) if leaf.ndim == 3 else (64,) * leaf.ndim)
        values = large[tuple(map(slice, leaf.shape))].astype(np.float32)
        return jnp.asarray(1 + values if "scale" in path[-1].key else values)

    return jax.tree_util.tree_map_with_path(
        draw, jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    )


def ranges() -> tuple[np.ndarray, ...]:
    """Returns key ranges of two documents; the first half of the second document attends to all of it."""
    i = np.arange(LENGTH)
    start_L = np.where(i < 10, 0, 10)
    return start_L.astype(np.int32), np.where(i < 10, i + 1, np.maximum(i + 1, 17)).astype(np.int32)


def logits(config, params) -> np.ndarray:
    tokens_L = np.random.default_rng(0).integers(0, VOCABULARY, LENGTH).astype(np.int32)
    start_L, end_L = ranges()
    return np.asarray(bind(config, params).logits(tokens_L[None], start_L[None], end_L[None]))[0]


each = pytest.mark.parametrize("switches", [*SWITCHES.values(), ALL], ids=[*SWITCHES, "all"])


@each
def test_logits_equal_those_of_a_model_in_numpy(switches):
    config = config_with(switches)
    params = random_params(config)
    tokens_L = np.random.default_rng(0).integers(0, VOCABULARY, LENGTH)
    expected = numpy_model.logits(config, params, tokens_L, *ranges())
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(config, params), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("head", "plain"), ("num_kv_heads", 2), ("head_dim", 12), ("tie_word_embeddings", True),
        ("qkv_bias", True), ("qk_norm", "head"), ("qk_norm", "projection"), ("norm_placement", "post"),
        ("rope_scaling.name", "llama3"), ("no_rope_layer_interval", 2), ("rope_theta", 1e4),
        ("norm_eps", 0.1),
    ],
)  # fmt: skip
def test_every_switch_changes_the_logits(switch, value):
    off, on = (
        config_with(LLAMA3 | {"rope_scaling.name": "none"} | changes) for changes in ({}, {switch: value})
    )
    assert np.abs(logits(off, random_params(off)) - logits(on, random_params(on))).max() > 1e-3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("factor", 7.0), ("low_freq_factor", 2.0), ("high_freq_factor", 8.0),
        ("original_max_position_embeddings", 32),
    ],
)  # fmt: skip
def test_every_parameter_of_the_scaling_changes_the_logits(key, value):
    a, b = config_with(LLAMA3), config_with(LLAMA3 | {f"rope_scaling.{key}": value})
    assert np.abs(logits(a, random_params(a)) - logits(b, random_params(b))).max() > 1e-3


@pytest.mark.parametrize("name", ["one key head", "norm of heads", "tied plain", "all"])
def test_cache_contains_only_key_heads_and_does_not_change_logits(name):
    config = config_with(ALL if name == "all" else SWITCHES[name])
    params = random_params(config)
    tokens_BxL = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)), jnp.int32)
    end_BxL = jnp.broadcast_to(jnp.arange(1, LENGTH + 1), (2, LENGTH))
    expected = jax.jit(lambda p: bind(config, p).logits(tokens_BxL, jnp.zeros_like(end_BxL), end_BxL))(params)

    @jax.jit
    def prompt(params, tokens_BxP):
        model = bind(config, params)
        features, cache = forward_prompt(model, tokens_BxP, None, LENGTH)
        return model.head.output(features), cache

    @jax.jit
    def extended(params, tokens_BxP, position_B, cache):
        model = bind(config, params)
        features, cache = forward_with_cache(model, tokens_BxP, position_B, None, cache)
        return model.head.output(features), cache

    part, cache = prompt(params, tokens_BxL[:, :12])
    found, heads = [part], config.num_kv_heads or config.num_heads
    assert cache.keys.shape == cache.values.shape == (2, 2, heads, LENGTH, config.head_dim or 8)
    for start, stop in ((12, 13), (13, LENGTH)):
        position_B = jnp.full(2, start, jnp.int32)
        part, cache = extended(params, tokens_BxL[:, start:stop], position_B, cache)
        found.append(part)
    np.testing.assert_allclose(jnp.concatenate(found, 1), expected, atol=1e-4)


def loss_and_gradients(config, params, chunk: int = 5):
    example = rewritten("masked_diffusion", batch([packed([9, 14], LENGTH)] * 4))

    @jax.jit
    def run(params):
        return jax.value_and_grad(lambda p: example_loss(bind(config, p), example, chunk, z_loss=0.1)[0])(
            params
        )

    return run(params)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", [name for name in POLICIES if name != "none"])
def test_remat_does_not_change_gradients(remat):
    config = config_with(ALL)
    params = random_params(config)
    expected = loss_and_gradients(config, params)
    assert all(float(abs(g).max()) > 0 for g in jax.tree.leaves(expected[1]))
    config.remat = remat
    assert_equal(loss_and_gradients(config, params), expected)


@pytest.mark.parametrize("head", ["plain", "projected"])
def test_the_gradient_of_a_tied_embedding_is_the_sum_of_both_uses(head):
    """Compares the chunked loss with z-loss with that of an untied model with the same matrices."""
    tied, untied = (config_with({"tie_word_embeddings": tie, "head": head}) for tie in (True, False))
    params = random_params(tied)
    embedding_VxD = params["embedding"]["embedding"]
    output = params["head"].get("output", {}) | {"kernel": embedding_VxD.T}
    twice = params | {"head": params["head"] | {"output": output}}
    loss, found = loss_and_gradients(tied, params)
    expected_loss, expected = loss_and_gradients(untied, twice)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    total_VxD = expected["embedding"]["embedding"] + expected["head"]["output"].pop("kernel").T
    np.testing.assert_allclose(found["embedding"]["embedding"], total_VxD, rtol=1e-4, atol=1e-4)
    assert_equal(found["blocks"], expected["blocks"])
    assert_equal(found["head"], {k: v for k, v in expected["head"].items() if v})


def test_the_formula_for_flops_agrees_with_xla():
    """For one layer, because XLA counts the body of a scan once. XLA also counts the softmax."""
    config = config_with({"num_kv_heads": 1, "head_dim": 32, "tie_word_embeddings": True, "head": "plain"})
    config.num_layers, config.d_model, config.d_ff = 1, 64, 192
    params = init_params(config, jax.random.key(0))
    tokens, zeros = jnp.zeros((2, 32), jnp.int32), jnp.zeros((2, 32), jnp.int32)
    forward = jax.jit(lambda params: bind(config, params).logits(tokens, zeros, zeros + 32))
    analysis = forward.lower(params).compile().cost_analysis()
    assert 2 * train_flops(config, 32, attended=1.0) / 3 == pytest.approx(analysis["flops"], rel=0.08)
    norms = 3 * 64
    assert matrix_parameters(config) == sum(p.size for p in jax.tree.leaves(params)) - norms
