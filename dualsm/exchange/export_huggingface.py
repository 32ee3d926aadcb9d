"""Exports a run as a Hugging Face model folder: weights, configs, tokenizer, model card and, if needed, code.

A run with the plain head is exported as a Llama, which loads with stock classes. A run with the paper's head
needs the two files of dualsm/exchange/remote and `trust_remote_code=True`. Token ids are external ids, see
dualsm/exchange/token_ids.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from dualsm.data.tokenizer import RESERVED_IDS, SPECIAL_PIECES, Tokenizer
from dualsm.exchange import token_ids
from dualsm.exchange.model_card import model_card
from dualsm.exchange.switches import check_expressible
from dualsm.exchange.tokenizer_export import external_special_ids, tokenizer_json
from dualsm.exchange.weight_files import write_safetensors
from dualsm.model.head_shapes import head_dim, num_kv_heads
from dualsm.process.output import new_folder
from dualsm.rundir.trained_run import TrainedRun

_REMOTE = Path(__file__).parent / "remote"
_OF_LLAMA = ("num_kv_heads", "head_dim")
_CODE = ("configuration_dualsm.py", "modeling_dualsm.py")

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
    "head/projection/kernel": "head_proj.weight",
    "head/output/kernel": "lm_head.weight",
    "head/output/bias": "lm_head.bias",
}


def export(run: TrainedRun, output: Path) -> str:
    """Writes the model folder atomically.

    Returns:
      A message for the user.

    Raises:
      UserError: if `output` is in use or cannot be written.
    """
    plain = run.config.model.head == "plain"
    name, supported = ("a Llama", _OF_LLAMA) if plain else ("the code of the paper's head", ())
    check_expressible(run.config.model, supported, name, "train without it to export the run")
    params = token_ids.to_external(jax.device_get(run.params), run.tokenizer.external_ids_V)
    config = llama_config(run) if plain else dualsm_config(run)
    with new_folder(output, "--output") as folder:
        write_safetensors(folder / "model.safetensors", named_tensors(params), {"format": "pt"})
        _write(folder / "config.json", config)
        _write(folder / "generation_config.json", generation_config(run.tokenizer))
        _write(folder / "tokenizer_config.json", tokenizer_config(run))
        (folder / "tokenizer.json").write_text(tokenizer_json(run.tokenizer), encoding="utf-8")
        (folder / "README.md").write_text(model_card(run, plain), encoding="utf-8")
        for name in () if plain else _CODE:
            shutil.copyfile(_REMOTE / name, folder / name)
    return f"a {'Llama' if plain else 'model with its own code'} for transformers in {output}"


def named_tensors(params: dict) -> dict[str, np.ndarray]:
    """Returns the weights by their names in transformers, where matrices are [outputs, inputs]."""
    tensors = {}
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        if not path.startswith("blocks/"):
            tensors[OUTER_NAMES[path]] = np.asarray(value).T if path.endswith("kernel") else value
            continue
        name = BLOCK_NAMES[path.removeprefix("blocks/")]
        for i, part in enumerate(value):
            tensors[f"model.layers.{i}.{name}"] = part.T if path.endswith("kernel") else part
    return tensors


def _shape(run: TrainedRun) -> dict:
    model, special = run.config.model, external_special_ids(run.tokenizer)
    return {
        "vocab_size": int(run.tokenizer.external_ids_V.max()) + 1,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": run.config.seq_len,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
        "pad_token_id": special["pad"],
    }


def llama_config(run: TrainedRun) -> dict:
    """Returns `config.json` of a run with the plain head."""
    theta = run.config.model.rope_theta
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_key_value_heads": num_kv_heads(run.config.model),
        "head_dim": head_dim(run.config.model),
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": theta,  # for transformers before version 5
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        **_shape(run),
    }


def dualsm_config(run: TrainedRun) -> dict:
    """Returns `config.json` of a run with the paper's head."""
    return {
        "architectures": ["DualSMForCausalLM"],
        "model_type": "dualsm",
        "auto_map": {
            "AutoConfig": "configuration_dualsm.DualSMConfig",
            "AutoModelForCausalLM": "modeling_dualsm.DualSMForCausalLM",
        },
        "rotary_base": run.config.model.rope_theta,
        "mask_token_id": external_special_ids(run.tokenizer)["mask"],
        **_shape(run),
    }


def generation_config(tokenizer: Tokenizer) -> dict:
    """Returns `generation_config.json`, which suppresses all special tokens except `</s>`."""
    special = external_special_ids(tokenizer)
    reserved = {int(i) for i in tokenizer.external_ids_V[:RESERVED_IDS] if i >= 0}
    return {
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
        "pad_token_id": special["pad"],
        "suppress_tokens": sorted(reserved - {special["eos"]}),
    }


def tokenizer_config(run: TrainedRun) -> dict:
    """Returns `tokenizer_config.json`; by default special tokens in a text are encoded as plain text."""
    names = {
        "bos_token": "bos",
        "eos_token": "eos",
        "pad_token": "pad",
        "unk_token": "unk",
        "mask_token": "mask",
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": run.config.seq_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        **{key: SPECIAL_PIECES[name] for key, name in names.items()},
    }


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
