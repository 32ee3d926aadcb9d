"""The interface of a model family, and the parts that all families of Llama's kind share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dualsm.exchange.families.hub_config import HubConfig
from dualsm.exchange.families.rope_settings import rope_keys, rope_settings
from dualsm.model.head_shapes import head_dim, num_kv_heads

BLOCK_NAMES = {
    "attention/norm/scale": "input_layernorm.weight",
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/output/kernel": "self_attn.o_proj.weight",
    "mlp/norm/scale": "post_attention_layernorm.weight",
    "mlp/value/kernel": "mlp.up_proj.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
}
OUTER_NAMES = {
    "embedding/embedding": "model.embed_tokens.weight",
    "head/norm/scale": "model.norm.weight",
    "head/output/kernel": "lm_head.weight",
}
LAYERS = "model.layers"


class Family(NamedTuple):
    """A model family.

    Attributes:
      model_type: name of the family in `config.json`.
      architecture: name of the causal language model class in transformers.
      settings: returns values of `config.model`, by flattened key, for the content of a `config.json`.
      keys: returns the family's own keys of `config.json` for `config.model`.
      fixed: values of `config.model` that all models of the family have, by flattened key.
      switches: keys of `dualsm.exchange.switches.SWITCHES` that the family can express, besides `fixed`.
      block_names: name of the tensor within a layer by path of the parameter.
    """

    model_type: str
    architecture: str
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    keys: Callable[[ConfigDict], dict[str, Any]]
    fixed: Mapping[str, Any] = {}  # noqa: B006 (never written to)
    switches: tuple[str, ...] = ("num_kv_heads", "head_dim", "tie_word_embeddings", "rope_scaling")
    block_names: Mapping[str, str] = BLOCK_NAMES


def common_settings(config: HubConfig, *, tied: bool = False) -> dict[str, Any]:
    """Takes the keys that all families share; a family overrides values that it fixes.

    Args:
      config: the config; the caller takes the keys specific to the family and calls `finish`.
      tied: whether the embeddings are tied if the file does not say so; transformers leaves out the value if
        it is the default of the class.

    Raises:
      UserError: for missing, unsupported and contradicting values.
    """
    d_model, num_heads = config.positive("hidden_size"), config.positive("num_attention_heads")
    heads = config.positive("num_key_value_heads", default=num_heads)
    size = config.positive("head_dim", default=0)
    config.allow("hidden_act", "silu")
    config.allow("attention_dropout", 0, 0.0)
    return {
        "num_layers": config.positive("num_hidden_layers"),
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": 0 if heads == num_heads else heads,
        "head_dim": 0 if size * num_heads == d_model else size,
        "d_ff": config.positive("intermediate_size"),
        "norm_eps": config.positive("rms_norm_eps", float),
        "tie_word_embeddings": config.take("tie_word_embeddings", bool, tied),
        "head": "plain",
        "qkv_bias": False,
        "qk_norm": "none",
        "norm_placement": "pre",
        "no_rope_layer_interval": 0,
        **rope_settings(config),
    }


def shape_keys(model: ConfigDict) -> dict[str, Any]:
    """Returns the keys of `config.json` that all models share. `model` is `config.model`."""
    return {
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": num_kv_heads(model),
        "head_dim": head_dim(model),
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
    }


def common_keys(model: ConfigDict) -> dict[str, Any]:
    """Returns the keys of `config.json` that all families share. `model` is `config.model`."""
    return {
        **shape_keys(model),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **rope_keys(model),
    }
