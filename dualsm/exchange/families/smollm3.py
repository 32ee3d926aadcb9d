"""SmolLM3: Llama with layers without RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dualsm.exchange.families.family import Family, common_keys, common_settings
from dualsm.exchange.families.hub_config import HubConfig
from dualsm.exchange.families.qwen import take_full_attention
from dualsm.process.errors import UserError


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    config = HubConfig(content)
    config.allow("attention_bias", False)
    config.allow("mlp_bias", False)
    take_full_attention(config)
    settings = common_settings(config, tied=True)
    config.take("no_rope_layer_interval", int, None)  # transformers only reads no_rope_layers, if present
    layers = config.take("no_rope_layers", list)
    config.finish()
    return settings | {"no_rope_layer_interval": _interval(layers, settings["num_layers"])}


def _interval(has_rope_N: list, num_layers: int) -> int:
    """Returns n if exactly every n-th layer has no RoPE, 0 if all have it."""
    values = has_rope_N[:num_layers]
    first = next((i + 1 for i, has_rope in enumerate(values) if has_rope == 0), 0)
    expected = [int(not first or (i + 1) % first != 0) for i in range(num_layers)]
    if values != expected:
        raise UserError(
            f"config.json: no_rope_layers={has_rope_N} is not supported, only every n-th layer without RoPE; "
            "choose another model"
        )
    return first


def _keys(model: ConfigDict) -> dict[str, Any]:
    interval = model.no_rope_layer_interval
    layers = [int(not interval or (i + 1) % interval != 0) for i in range(model.num_layers)]
    own = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "no_rope_layers": layers}
    return own | ({"no_rope_layer_interval": interval} if interval else {}) | common_keys(model)


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    _settings,
    _keys,
    switches=("num_kv_heads", "head_dim", "tie_word_embeddings", "rope_scaling", "no_rope_layer_interval"),
)
