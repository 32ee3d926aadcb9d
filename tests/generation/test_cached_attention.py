"""Attention with a cache equals attention to an array that contains the old and the new keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.generation.cached_attention import attend_with_cache
from dualsm.model.attention import QUERIES, attend


@pytest.mark.parametrize("new", [1, 5, QUERIES + 3])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_a_cache_equals_attention_to_all_keys(new, causal):
    """Also with grouped queries, in several chunks, and with other values in unused parts of the cache."""
    size, position_B = new + 12, np.array([0, 4, 12], np.int32)
    keys = jax.random.split(jax.random.key(0), 5)
    q_BxPxHxK = jax.random.normal(keys[0], (3, new, 4, 8))
    k_BxPxZxK, v_BxPxZxK = (jax.random.normal(key, (3, new, 2, 8)) for key in keys[1:3])
    old = [jax.random.normal(key, (3, 2, size, 8)) for key in keys[3:]]
    position_BxP = position_B[:, None] + np.arange(new)
    key_end_BxP = jnp.asarray(
        position_BxP + 1 if causal else np.repeat(position_BxP[:, -1:] + 1, new, axis=1)
    )
    found = attend_with_cache(q_BxPxHxK, k_BxPxZxK, v_BxPxZxK, *old, position_B, key_end_BxP)
    for b, start in enumerate(position_B):
        k_SxZxK, v_SxZxK = (
            jnp.concatenate([cached[b, :, :start].swapaxes(0, 1), x[b]])
            for cached, x in zip(old, (k_BxPxZxK, v_BxPxZxK), strict=True)
        )
        ends = key_end_BxP[b : b + 1]
        expected = attend(q_BxPxHxK[b : b + 1], k_SxZxK[None], v_SxZxK[None], jnp.zeros_like(ends), ends)
        np.testing.assert_allclose(found[b], expected[0], atol=1e-5)
