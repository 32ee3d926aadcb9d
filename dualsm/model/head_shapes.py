"""Number and size of attention heads, with the defaults of config values that are 0."""

from __future__ import annotations

import ml_collections

from dualsm.process.errors import UserError


def head_dim(config: ml_collections.ConfigDict) -> int:
    """Returns K, the size of a head. `config` is `config.model`."""
    return config.head_dim or config.d_model // config.num_heads


def num_kv_heads(config: ml_collections.ConfigDict) -> int:
    """Returns Z, the number of key and value heads. `config` is `config.model`."""
    return config.num_kv_heads or config.num_heads


def check_heads(model: ml_collections.ConfigDict) -> None:
    """Raises `UserError` if the heads of `config.model` do not fit together."""
    if not model.head_dim and (model.d_model % model.num_heads or model.d_model // model.num_heads % 2):
        raise UserError(
            f"config.model.num_heads={model.num_heads} must divide config.model.d_model={model.d_model} "
            "into heads of even width; change one of them, or set config.model.head_dim"
        )
    if head_dim(model) % 2:
        raise UserError(f"config.model.head_dim={model.head_dim} must be even; change it")
    if model.num_heads % num_kv_heads(model):
        raise UserError(
            f"config.model.num_kv_heads={model.num_kv_heads} must divide "
            f"config.model.num_heads={model.num_heads}; change one of them"
        )
