"""A tiny model and packed rows for the tests of objectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dualsm.config import default_config
from dualsm.model.transformer import bind, init_params
from dualsm.objectives.example import Example, Row, SpecialIds
from dualsm.objectives.mixture import row_keys
from dualsm.objectives.registry import OBJECTIVES
from dualsm.training.objective_loss import example_loss

VOCABULARY = 64
SPECIAL = SpecialIds(vocab_size=VOCABULARY)


def tiny_model(vocab_size: int = VOCABULARY, width: int = 16) -> ConfigDict:
    model = default_config().model
    model.num_layers, model.d_model, model.num_heads, model.d_ff = 2, width, 2, 24
    model.vocab_size, model.rope_theta = vocab_size, 100.0
    model.remat, model.attention = "none", "xla"
    return model


@pytest.fixture(scope="session")
def model_config() -> ConfigDict:
    return tiny_model()


@pytest.fixture(scope="session")
def params(model_config) -> dict:
    """Random parameters, larger than at initialization, so that all dependencies are measurable."""
    return far_from_initial(model_config, 0.2)


def far_from_initial(config: ConfigDict, distance: float) -> dict:
    """Returns initial parameters plus `distance` times normal noise."""

    @jax.jit
    def parameters():
        fresh = init_params(config, jax.random.key(1))
        keys = iter(jax.random.split(jax.random.key(2), 100))
        return jax.tree.map(lambda p: p + distance * jax.random.normal(next(keys), p.shape), fresh)

    return parameters()


@pytest.fixture(scope="session")
def score(model_config):
    """Returns `example_loss` as a compiled function of (params, example)."""
    return jax.jit(lambda params, example: example_loss(bind(model_config, params), example, chunk=8))


@pytest.fixture(scope="session")
def gradient(score):
    """Returns the compiled gradient of the weighted sum with respect to the parameters."""
    return jax.jit(jax.grad(lambda params, example: score(params, example)[0]))


def packed(lengths: list[int], seq_len: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and documents of a row of random text, cut or padded to L + 1 tokens."""
    rng = np.random.default_rng(seed)
    tokens, documents = [], []
    for number, length in enumerate(lengths):
        tokens += [2, *rng.integers(16, VOCABULARY, length - 1)]
        documents += [number] * length
    filling = max(0, seq_len + 1 - len(tokens))
    tokens, documents = tokens + [0] * filling, documents + [-1] * filling
    return np.array(tokens[: seq_len + 1], np.int32), np.array(documents[: seq_len + 1], np.int32)


def batch(rows: list[tuple[np.ndarray, np.ndarray]], progress: float = 0.0) -> Row:
    """Stacks rows into a batch, with their strata."""
    size = len(rows)
    return Row(
        jnp.asarray([tokens for tokens, _ in rows]),
        jnp.asarray([documents for _, documents in rows]),
        jnp.arange(size),
        jnp.full(size, size),
        jnp.full(size, progress, jnp.float32),
    )


def rewritten(name: str, rows: Row, seed: int = 0, **options) -> Example:
    """Returns the examples of a batch under an objective with the given options, as NumPy arrays."""
    keys_B = row_keys(jax.random.key(seed), len(rows.tokens_L1))
    shares = {key: options.pop(key) for key in ("first", "last", "low", "high") if key in options}
    return jax.tree.map(np.asarray, _rewrite(name, tuple(options.items()))(rows, keys_B, shares))


@functools.cache
def _rewrite(name: str, options: tuple):
    """Compiles once per objective, options and shape; fractions are arguments."""

    def rewrite(rows: Row, keys_B: jax.Array, shares: dict) -> Example:
        keywords = dict(options) | shares
        return jax.vmap(lambda row, key: OBJECTIVES[name](row, key, SPECIAL, **keywords))(rows, keys_B)

    return jax.jit(rewrite)
