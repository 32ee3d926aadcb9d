"""Number and size of attention heads, with the defaults of config values that are 0."""

from __future__ import annotations

import ml_collections


def head_dim(config: ml_collections.ConfigDict) -> int:
    """Returns K, the size of a head. `config` is `config.model`."""
    return config.head_dim or config.d_model // config.num_heads


def num_kv_heads(config: ml_collections.ConfigDict) -> int:
    """Returns Z, the number of key and value heads. `config` is `config.model`."""
    return config.num_kv_heads or config.num_heads
