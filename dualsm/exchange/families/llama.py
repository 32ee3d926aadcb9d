"""Llama, which includes SmolLM, SmolLM2 and TinyLlama, and Mistral without a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dualsm.exchange.families.family import Family, common_keys, common_settings
from dualsm.exchange.families.hub_config import HubConfig
from dualsm.process.errors import UserError


def _llama_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    config = HubConfig(content)
    config.allow("attention_bias", False)
    config.allow("mlp_bias", False)
    config.allow("rope_interleaved", False)
    settings = common_settings(config)
    config.finish()
    return settings


def _llama_keys(model: ConfigDict) -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False, **common_keys(model)}


def _mistral_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    config = HubConfig(content)
    if "sliding_window" not in content:  # the default of transformers is 4096
        raise UserError("config.json has no sliding_window; add null if the model attends to all keys")
    config.allow("sliding_window")
    settings = common_settings(config)
    config.finish()
    return settings


def _mistral_keys(model: ConfigDict) -> dict[str, Any]:
    return {"sliding_window": None, **common_keys(model)}


LLAMA = Family("llama", "LlamaForCausalLM", _llama_settings, _llama_keys)
MISTRAL = Family("mistral", "MistralForCausalLM", _mistral_settings, _mistral_keys)
