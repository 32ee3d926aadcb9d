"""Architecture switches of `config.model`, and checks that an export format supports them."""

from __future__ import annotations

from ml_collections import ConfigDict

from dualsm.config import default_config
from dualsm.model.head_shapes import head_dim, num_kv_heads

SWITCHES = (
    "num_kv_heads",
    "head_dim",
    "tie_word_embeddings",
    "qkv_bias",
    "qk_norm",
    "norm_placement",
    "rope_scaling",
    "no_rope_layer_interval",
)


def switched_on(model: ConfigDict) -> list[str]:
    """Returns the keys of `SWITCHES` that change the architecture. `model` is `config.model`."""
    defaults = default_config().model
    without_effect = {
        "num_kv_heads": num_kv_heads(model) == model.num_heads,
        "head_dim": head_dim(model) * model.num_heads == model.d_model,
        "rope_scaling": model.rope_scaling.name == "none",
    }
    return [key for key in SWITCHES if not without_effect.get(key, model[key] == defaults[key])]
