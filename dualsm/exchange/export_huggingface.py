"""Exports a run as a Hugging Face model folder: weights, configs, tokenizer, model card and, if needed, code.

A run is exported as a model of a family of transformers, which loads with stock classes, if one has its
architecture: the family that the run was imported from, or else the first one. Other runs, such as those with
the paper's head, need the code in dualsm/exchange/remote and `trust_remote_code=True`. Token ids are
external ids, see dualsm/exchange/token_ids.py.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from dualsm.data.tokenizer import RESERVED_IDS
from dualsm.exchange import token_ids
from dualsm.exchange.families.family import BLOCK_NAMES, LAYERS, OUTER_NAMES, Family, shape_keys
from dualsm.exchange.families.family_table import family_of_run
from dualsm.exchange.families.qwen import QWEN2, QWEN3
from dualsm.exchange.model_card import model_card
from dualsm.exchange.sharded_files import MAX_SHARD_BYTES, write_shards
from dualsm.exchange.shifted_masks import USE_DUALSM, check_shifted
from dualsm.exchange.tokenizer_export import (
    exported_tokenizer,
    external_special_ids,
    special_pieces,
    tokenizer_json,
)
from dualsm.exchange.weights_source import read_source
from dualsm.model import id_ranges
from dualsm.process.output import new_folder
from dualsm.rundir.trained_run import TrainedRun

_REMOTE = Path(__file__).parent / "remote"
_CODE = ("configuration_dualsm.py", "decoder_dualsm.py", "modeling_dualsm.py", "modeling_dualsm_masked.py")
# Names of parameters of models with their own code, with all switches and with the paper's head.
_OWN_BLOCK_NAMES = {**QWEN2.block_names, **QWEN3.block_names}
_HEAD_NAMES = {"head/projection/kernel": "head_proj.weight", "head/output/bias": "lm_head.bias"}


def export(
    run: TrainedRun,
    output: epath.Path,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    own_code: bool = False,
) -> str:
    """Writes the model folder atomically.

    Args:
      run: the run.
      output: folder to create.
      dtype: type of the weights, see `write_shards`.
      max_shard_bytes: size above which the weights are divided into several files.
      own_code: export with the files of dualsm/exchange/remote even if a stock class has the architecture.

    Returns:
      A message for the user.

    Raises:
      UserError: if the masked modes of the export would be wrong, or `output` is in use or cannot be written.
    """
    run = dataclasses.replace(run, tokenizer=exported_tokenizer(run))
    source = read_source(run)
    stock = family_of_run(run.config.model, source.get("model_type"))
    family = None if own_code else stock
    if family is None:
        check_shifted(run, "leave out --own_code" if stock else USE_DUALSM)
    longest = max(source.get("max_position_embeddings", 0), run.config.seq_len)
    config = family_config(run, family, dtype, longest) if family else dualsm_config(run, dtype, longest)
    block_names = family.block_names if family else _OWN_BLOCK_NAMES
    params = token_ids.to_external(jax.device_get(run.params), run.tokenizer.external_ids_V)
    with new_folder(output, "--output", last="config.json") as folder:
        write_shards(folder, named_tensors(params, block_names), dtype, max_shard_bytes)
        _write(folder / "config.json", config)
        _write(folder / "generation_config.json", generation_config(run))
        _write(folder / "tokenizer_config.json", tokenizer_config(run, longest))
        (folder / "tokenizer.json").write_text(tokenizer_json(run.tokenizer), encoding="utf-8")
        (folder / "README.md").write_text(model_card(run, family is not None), encoding="utf-8")
        for name in () if family else _CODE:
            shutil.copyfile(_REMOTE / name, folder / name)
    return f"{family.architecture if family else 'a model with its own code'} for transformers in {output}"


def named_tensors(params: dict, block_names: Mapping[str, str] = BLOCK_NAMES) -> dict[str, np.ndarray]:
    """Returns the weights by their names in transformers, where matrices are [outputs, inputs].

    Args:
      params: parameters with external ids.
      block_names: names of the tensors of a layer, see `Family`.
    """
    tensors = {}
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        if not path.startswith("blocks/"):
            name = (OUTER_NAMES | _HEAD_NAMES)[path]
            tensors[name] = np.asarray(value).T if path.endswith("kernel") else np.asarray(value)
            continue
        name = block_names[path.removeprefix("blocks/")]
        for i, part in enumerate(np.asarray(value)):
            tensors[f"{LAYERS}.{i}.{name}"] = part.T if path.endswith("kernel") else part
    return tensors


def _tokens_and_type(run: TrainedRun, dtype: str) -> dict:
    special = external_special_ids(run.tokenizer)
    return {
        "vocab_size": int(run.tokenizer.external_ids_V.max()) + 1,
        "torch_dtype": dtype,
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
        "pad_token_id": special["pad"],
    }


def family_config(run: TrainedRun, family: Family, dtype: str, max_position_embeddings: int) -> dict:
    """Returns `config.json` of a model of a family of transformers."""
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.keys(run.config.model),
        "max_position_embeddings": max_position_embeddings,
        **_tokens_and_type(run, dtype),
    }


def dualsm_config(run: TrainedRun, dtype: str, max_position_embeddings: int) -> dict:
    """Returns `config.json` of a model with its own code."""
    model = run.config.model
    scaling = {key: value for key, value in model.rope_scaling.items() if key != "name"}
    return {
        "architectures": ["DualSMForCausalLM"],
        "model_type": "dualsm",
        "auto_map": {
            "AutoConfig": "configuration_dualsm.DualSMConfig",
            "AutoModelForCausalLM": "modeling_dualsm.DualSMForCausalLM",
            "AutoModelForMaskedLM": "modeling_dualsm_masked.DualSMForMaskedLM",
        },
        **shape_keys(model),
        **{key: model[key] for key in ("qkv_bias", "qk_norm", "norm_placement", "head")},
        "max_position_embeddings": max_position_embeddings,
        "rotary_base": model.rope_theta,
        "rotary_scaling": None if model.rope_scaling.name == "none" else scaling,
        "no_rope_layer_interval": model.no_rope_layer_interval,
        "mask_token_id": external_special_ids(run.tokenizer)["mask"],
        "never_predicted_ids": never_predicted_ids(run),
        **_tokens_and_type(run, dtype),
    }


def never_predicted_ids(run: TrainedRun) -> list[int]:
    """Returns the external ids whose logits are masked."""
    masked_V = id_ranges.contains(run.config.model.never_predicted, np.arange(run.tokenizer.vocab_size))
    external_M = run.tokenizer.external_ids_V[np.asarray(masked_V)]
    return sorted({int(i) for i in external_M if i >= 0} - {external_special_ids(run.tokenizer)["eos"]})


def generation_config(run: TrainedRun) -> dict:
    """Returns `generation_config.json`, which suppresses masked ids and all special tokens except `</s>`."""
    tokenizer = run.tokenizer
    special = external_special_ids(tokenizer)
    reserved = {int(i) for i in tokenizer.external_ids_V[:RESERVED_IDS] if i >= 0}
    return {
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
        "pad_token_id": special["pad"],
        "suppress_tokens": sorted((reserved | {*never_predicted_ids(run)}) - {special["eos"]}),
    }


def tokenizer_config(run: TrainedRun, model_max_length: int) -> dict:
    """Returns `tokenizer_config.json`; by default special tokens in a text are encoded as plain text."""
    names = {
        "bos_token": "bos",
        "eos_token": "eos",
        "pad_token": "pad",
        "unk_token": "unk",
        "mask_token": "mask",
    }
    pieces, special = special_pieces(run.tokenizer), external_special_ids(run.tokenizer)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        **{key: pieces[name] for key, name in names.items() if special[name] is not None},
    }


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
