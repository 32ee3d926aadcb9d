"""A tiny model and packed rows for the objectives' tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dualsm.model.transformer import init_params
from dualsm.objectives.example import Row


def tiny_model(vocabulary: int = 64, width: int = 16) -> ConfigDict:
    return ConfigDict(
        {
            "layers": 2,
            "width": width,
            "heads": 2,
            "mlp_width": 24,
            "vocabulary": vocabulary,
            "rope_theta": 100.0,
            "norm_eps": 1e-7,
            "dtype": "float32",
            "remat": "none",
            "attention": "xla",
        }
    )


@pytest.fixture(scope="session")
def model_config() -> ConfigDict:
    return tiny_model()


@pytest.fixture(scope="session")
def params(model_config) -> dict:
    """Random parameters, larger than at initialisation so that every influence shows."""
    fresh = init_params(model_config, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    return jax.tree.map(lambda p: p + 0.2 * jax.random.normal(next(keys), p.shape), fresh)


def packed(lengths: list[int], row_tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A row of random text tokens in documents of the given lengths, cut or filled up to L + 1."""
    rng = np.random.default_rng(seed)
    tokens, documents = [], []
    for number, length in enumerate(lengths):
        tokens += [2, *rng.integers(16, 64, length - 1)]
        documents += [number] * length
    filling = max(0, row_tokens + 1 - len(tokens))
    tokens, documents = tokens + [0] * filling, documents + [-1] * filling
    return np.array(tokens[: row_tokens + 1], np.int32), np.array(documents[: row_tokens + 1], np.int32)


def batch(rows: list[tuple[np.ndarray, np.ndarray]]) -> Row:
    """Rows stacked into a batch, with their strata."""
    size = len(rows)
    return Row(
        jnp.asarray([tokens for tokens, _ in rows]),
        jnp.asarray([documents for _, documents in rows]),
        jnp.arange(size),
        jnp.full(size, size),
        jnp.zeros(size),
    )
