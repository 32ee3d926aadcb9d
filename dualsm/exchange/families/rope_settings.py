"""RoPE in `config.json`: `rope_parameters` since transformers 5, `rope_theta` and `rope_scaling` before."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from dualsm.exchange.families.hub_config import HubConfig
from dualsm.process.errors import UserError

_LLAMA3 = {
    "factor": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "original_max_position_embeddings": int,
}


def rope_settings(config: HubConfig) -> dict[str, Any]:
    """Takes the keys of RoPE in either spelling; returns values of `config.model` by flattened key.

    Raises:
      UserError: for an unknown type of scaling, missing or additional numbers, and contradicting spellings.
    """
    merged: dict[str, Any] = {}
    theta = config.positive("rope_theta", float, None)
    for part in (
        {"rope_theta": theta},
        *(config.take(key, dict, {}) for key in ("rope_scaling", "rope_parameters")),
    ):
        for key, value in part.items():
            name = "rope_type" if key == "type" else key
            if value is not None and merged.setdefault(name, value) != value:
                raise UserError(
                    f"config.json: {name} of RoPE is both {merged[name]!r} and {value!r}; remove one"
                )
    return _settings(HubConfig({"rope_type": "default"} | merged))


def _settings(rope: HubConfig) -> dict[str, Any]:
    name = rope.take("rope_type", str)
    if name not in ("default", "llama3"):
        raise UserError(
            f"config.json: RoPE of the type {name!r} is not supported, only 'default' and 'llama3'; choose "
            "another model"
        )
    rope.allow("partial_rotary_factor", 1, 1.0)
    settings = {"rope_theta": rope.positive("rope_theta", float)}
    settings["rope_scaling.name"] = "none" if name == "default" else name
    if name == "llama3":
        settings |= {f"rope_scaling.{key}": rope.positive(key, kind) for key, kind in _LLAMA3.items()}
    rope.finish()
    return settings


def rope_keys(model: ConfigDict) -> dict[str, Any]:
    """Returns the keys of `config.json` in both spellings. `model` is `config.model`."""
    theta, scaling = model.rope_theta, model.rope_scaling
    if scaling.name == "none":
        return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    old = {"rope_type": scaling.name, **{key: scaling[key] for key in _LLAMA3}}
    return {"rope_theta": theta, "rope_scaling": old, "rope_parameters": old | {"rope_theta": theta}}
