"""OLMo 2: norms of the outputs of attention and MLP, and of whole projections of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dualsm.exchange.families.family import BLOCK_NAMES, Family, common_keys, common_settings
from dualsm.exchange.families.hub_config import HubConfig

_FIXED = {"qk_norm": "projection", "norm_placement": "post"}


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    config = HubConfig(content)
    config.allow("attention_bias", False)
    settings = common_settings(config)
    config.finish()
    return settings | _FIXED


def _keys(model: ConfigDict) -> dict[str, Any]:
    return {"attention_bias": False, **common_keys(model)}


OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    _settings,
    _keys,
    fixed=_FIXED,
    block_names={
        **BLOCK_NAMES,
        "attention/norm/scale": "post_attention_layernorm.weight",
        "attention/query_norm/scale": "self_attn.q_norm.weight",
        "attention/key_norm/scale": "self_attn.k_norm.weight",
        "mlp/norm/scale": "post_feedforward_layernorm.weight",
    },
)
