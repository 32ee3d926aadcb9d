"""Qwen2, which includes Qwen2.5, with biases of queries, keys and values; Qwen3, with norms of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dualsm.exchange.families.family import BLOCK_NAMES, Family, common_keys, common_settings
from dualsm.exchange.families.hub_config import HubConfig
from dualsm.process.errors import UserError

_QWEN2 = {"qkv_bias": True}
_QWEN3 = {"qk_norm": "head"}


def take_full_attention(config: HubConfig) -> None:
    """Takes the keys of sliding windows. Raises `UserError` if a window is in use."""
    config.allow("use_sliding_window", False)
    config.take("sliding_window", int, None)  # not used without use_sliding_window
    for kind in config.take("layer_types", list, []):
        HubConfig({"layer_types": kind}).allow("layer_types", "full_attention")


def _qwen2_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    config = HubConfig(content)
    take_full_attention(config)
    settings = common_settings(config)
    config.finish()
    return settings | _QWEN2


def _qwen3_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    config = HubConfig(content)
    take_full_attention(config)
    config.allow("attention_bias", False)
    if "head_dim" not in content:  # the default of transformers is 128
        raise UserError("config.json has no head_dim; add the size of an attention head")
    settings = common_settings(config)
    config.finish()
    return settings | _QWEN3


def _qwen2_keys(model: ConfigDict) -> dict[str, Any]:
    return {"use_sliding_window": False, **common_keys(model)}


def _qwen3_keys(model: ConfigDict) -> dict[str, Any]:
    return {"attention_bias": False, "use_sliding_window": False, **common_keys(model)}


QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _qwen2_settings,
    _qwen2_keys,
    fixed=_QWEN2,
    block_names={
        **BLOCK_NAMES,
        "attention/query/bias": "self_attn.q_proj.bias",
        "attention/key/bias": "self_attn.k_proj.bias",
        "attention/value/bias": "self_attn.v_proj.bias",
    },
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _qwen3_settings,
    _qwen3_keys,
    fixed=_QWEN3,
    block_names={
        **BLOCK_NAMES,
        "attention/query_norm/scale": "self_attn.q_norm.weight",
        "attention/key_norm/scale": "self_attn.k_norm.weight",
    },
)
