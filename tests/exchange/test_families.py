"""Conversion between config.json and settings for each family, without torch and transformers."""

import json

import pytest

from dualsm.config import default_config
from dualsm.exchange.families.family_table import FAMILIES, family_of_config, family_of_run
from dualsm.process.errors import UserError

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 96,
    "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "rope_theta": 10000, "tie_word_embeddings": True, "max_position_embeddings": 512,
    "vocab_size": 320, "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
    "rope_scaling": None, "pretraining_tp": 1, "_model_name_or_path": "a name",
}  # fmt: skip
OWN = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"head_dim": 32, "layer_types": ["full_attention"] * 3},
    "olmo2": {"head_dim": 24},
    "smollm3": {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2, "use_sliding_window": False},
}
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def content(model_type: str, **changes) -> dict:
    architecture = FAMILIES[model_type].architecture
    whole = LLAMA | {"model_type": model_type, "architectures": [architecture]} | OWN[model_type] | changes
    if model_type in ("mistral", "qwen2"):
        whole.pop("attention_bias"), whole.pop("mlp_bias")
    if model_type in ("qwen3", "olmo2"):
        whole.pop("mlp_bias")
    return {key: value for key, value in whole.items() if value != "absent"}


def settings(model_type: str, **changes) -> dict:
    found = content(model_type, **changes)
    return family_of_config(found).settings(found)


def model_of(values: dict):
    model = default_config().model
    model.update_from_flattened_dict(values)
    return model


@pytest.mark.parametrize("model_type", OWN)
@pytest.mark.parametrize("scaling", [False, True])
def test_settings_round_trip_through_config_json(model_type, scaling):
    changes = {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}} if scaling else {}
    before = settings(model_type, **changes)
    model = model_of(before)
    family = family_of_run(model, model_type)
    assert family.model_type == model_type
    written = json.loads(json.dumps(family.keys(model) | {"model_type": model_type, "vocab_size": 320}))
    assert family_of_config(written).settings(written) == before


def test_shape_is_read():
    found = settings("llama", head_dim=20)
    assert found == {
        "num_layers": 3, "d_model": 96, "num_heads": 6, "num_kv_heads": 2, "head_dim": 20, "d_ff": 200,
        "norm_eps": 1e-5, "tie_word_embeddings": True, "head": "plain", "rope_theta": 10000.0,
        "rope_scaling.name": "none", "qkv_bias": False, "qk_norm": "none", "norm_placement": "pre",
        "no_rope_layer_interval": 0,
    }  # fmt: skip
    assert settings("llama", num_key_value_heads="absent")["num_kv_heads"] == 0
    assert settings("llama", head_dim=16)["head_dim"] == 0


def test_fixed_settings_of_families():
    assert settings("qwen2")["qkv_bias"]
    assert settings("qwen3")["qk_norm"] == "head"
    olmo = settings("olmo2")
    assert (olmo["qk_norm"], olmo["norm_placement"]) == ("projection", "post")
    assert settings("smollm3")["no_rope_layer_interval"] == 2
    assert settings("smollm3", no_rope_layers=[1, 1, 1])["no_rope_layer_interval"] == 0


def test_tied_embeddings_that_config_json_does_not_state():
    assert settings("smollm3", tie_word_embeddings="absent")["tie_word_embeddings"]
    assert not settings("llama", tie_word_embeddings="absent")["tie_word_embeddings"]


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3", "rope_type": "llama3"}},
        {"rope_theta": "absent", "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000}},
    ],
)
def test_all_spellings_of_rope(spelling):
    found = settings("llama", **spelling)
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling.name"] == "llama3"
    assert {key: found[f"rope_scaling.{key}"] for key in LLAMA3} == LLAMA3


REFUSED = {
    "a window": ("mistral", {"sliding_window": 4096}, "sliding_window=4096"),
    "an unknown window": ("mistral", {"sliding_window": "absent"}, "no sliding_window"),
    "a window of Qwen": ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
    "layers with a window": ("qwen3", {"layer_types": ["sliding_attention"]}, "layer_types='sliding"),
    "a soft cap": ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    "a soft cap of logits": ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "dropout": ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    "an attention bias": ("llama", {"attention_bias": True}, "attention_bias=True"),
    "an attention bias of Qwen3": ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    "an MLP bias": ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    "YaRN": ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE of the type 'yarn'"),
    "dynamic RoPE": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "the type 'dynamic'"),
    "a scaling without type": ("llama", {"rope_scaling": {"factor": 2.0}}, "factor=2.0 is not understood"),
    "half a scaling": ("llama", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "no low_freq_factor"),
    "no base of RoPE": ("llama", {"rope_theta": "absent"}, "no rope_theta"),
    "two bases of RoPE": (
        "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta of RoPE is",
    ),
    "partial RoPE": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "interleaved RoPE": ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
    "quantization": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "an irregular pattern": ("smollm3", {"no_rope_layers": [0, 1, 1]}, r"no_rope_layers=\[0, 1, 1\]"),
    "no head_dim": ("qwen3", {"head_dim": "absent"}, "no head_dim"),
    "a text for a number": ("llama", {"hidden_size": "96"}, "hidden_size='96' must be of type int"),
    "a negative number": ("llama", {"num_hidden_layers": -1}, "num_hidden_layers=-1 must be positive"),
    "another class": ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unknown_keys_and_values_are_rejected_by_name(case):
    model_type, changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        settings(model_type, **changes)


@pytest.mark.parametrize("name", ["gpt2", None, 3, ["llama"]])
def test_unknown_family_is_rejected(name):
    with pytest.raises(UserError, match="model_type"):
        family_of_config({"model_type": name})


def test_run_is_exported_as_a_family_that_can_express_it():
    for values, expected in (
        ({}, "llama"), ({"num_kv_heads": 2}, "llama"), ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": "head"}, "qwen3"), ({"qk_norm": "projection", "norm_placement": "post"}, "olmo2"),
        ({"no_rope_layer_interval": 4}, "smollm3"),
    ):  # fmt: skip
        assert family_of_run(model_of({"head": "plain"} | values)).model_type == expected
    assert family_of_run(model_of({"head": "plain"}), "mistral").model_type == "mistral"
    assert family_of_run(model_of({"head": "plain", "qkv_bias": True}), "mistral").model_type == "qwen2"
    for values in ({"head": "projected"}, {"head": "plain", "qk_norm": "head", "qkv_bias": True}):
        assert family_of_run(model_of(values)) is None
