"""Parameter names and shapes of the paper's released weights (arXiv 2512.14549).

Their matrices are [outputs, inputs], and each layer has its own tensors. dualsm's matrices are
[inputs, outputs] and stacked over layers. Some files prefix all names with `param.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from dualsm.process.errors import UserError

_PREFIX = "param."
_LAYERS = "encoder.layers"

BLOCK_NAMES = {
    "attention/norm/scale": "attention.pre_norm.weight",
    "attention/query/kernel": "attention.qkv_proj.weights.0",
    "attention/key/kernel": "attention.qkv_proj.weights.1",
    "attention/value/kernel": "attention.qkv_proj.weights.2",
    "attention/output/kernel": "attention.out_proj.weight",
    "mlp/norm/scale": "mlp.pre_norm.weight",
    "mlp/value/kernel": "mlp.up_proj.weights.0",
    "mlp/gate/kernel": "mlp.up_proj.weights.1",
    "mlp/down/kernel": "mlp.down_proj.weight",
}
OUTER_NAMES = {
    "embedding/embedding": "embedding.word_embedding.weight",
    "head/norm/scale": "classifier.pre_norm.weight",
    "head/projection/kernel": "classifier.projection.weight",
    "head/output/kernel": "classifier.emb2vocab.weight",
    "head/output/bias": "classifier.emb2vocab.bias",
}
# Keys of `config.model` and their names in the reference format.
SETTINGS = {
    "num_layers": "num_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "norm_eps",
}


def to_params(tensors: Mapping[str, np.ndarray]) -> dict:
    """Converts named tensors to dualsm's parameters, a nested dict.

    Raises:
      UserError: if tensors are missing, unknown or of the wrong shape.
    """
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    layers = sorted({int(m[1]) for name in tensors if (m := re.match(rf"{_LAYERS}\.(\d+)\.", name))})
    numbers = range(max(len(layers), 1))  # not up to the highest number, which a damaged file may make huge
    expected = {*OUTER_NAMES.values()}
    expected |= {f"{_LAYERS}.{i}.{name}" for i in numbers for name in BLOCK_NAMES.values()}
    for problem, names in (("missing", expected - tensors.keys()), ("unknown", tensors.keys() - expected)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"--weights: not a reference model, {problem} tensors: {listed}; give the released state dict"
            )
    flat = {path: _transposed(path, tensors[name]) for path, name in OUTER_NAMES.items()}
    for path, name in BLOCK_NAMES.items():
        parts = [_transposed(path, tensors[f"{_LAYERS}.{i}.{name}"]) for i in layers]
        if len({part.shape for part in parts}) > 1:
            raise UserError(f"--weights: the shape of {_LAYERS}.*.{name} differs between layers")
        flat[f"blocks/{path}"] = np.stack(parts)
    _check_shapes(flat)
    return traverse_util.unflatten_dict(flat, sep="/")


def from_params(params: dict) -> dict[str, np.ndarray]:
    """Converts dualsm's parameters to the named tensors of the released files."""
    flat = traverse_util.flatten_dict(params, sep="/")
    tensors = {name: _transposed(path, np.asarray(flat[path])) for path, name in OUTER_NAMES.items()}
    for path, name in BLOCK_NAMES.items():
        for i, part in enumerate(np.asarray(flat[f"blocks/{path}"])):
            tensors[f"{_LAYERS}.{i}.{name}"] = _transposed(path, part)
    return tensors


def model_settings(params: dict, declared: Mapping[str, float]) -> dict[str, int | float | str]:
    """Returns the values of `config.model` for given weights.

    Args:
      params: from `to_params`; their shapes determine num_layers, d_model and d_ff.
      declared: numbers by their names in the reference format, see `SETTINGS`; they determine the others.

    Returns:
      Values by key of `config.model`, without the keys that `declared` lacks.

    Raises:
      UserError: if `declared` contradicts the weights.
    """
    num_layers, d_model, d_ff = params["blocks"]["mlp"]["value"]["kernel"].shape
    from_shapes = {"num_layers": num_layers, "d_model": d_model, "d_ff": d_ff}
    for key, value in from_shapes.items():
        name = SETTINGS[key]
        if declared.get(name, value) != value:
            raise UserError(f"{name}={declared[name]:g} but the weights have {value}; give their config.json")
    settings = {key: declared[name] for key, name in SETTINGS.items() if name in declared}
    if "num_heads" in settings:
        name, value = SETTINGS["num_heads"], settings["num_heads"]
        if value not in range(1, d_model + 1):
            raise UserError(f"{name}={value:g} must be an integer from 1 to {d_model}")
        settings["num_heads"] = int(value)
    return settings | from_shapes | {"head": "projected"}


def _transposed(path: str, tensor: np.ndarray) -> np.ndarray:
    """Transposes matrices; returns other tensors, and the embedding, unchanged."""
    return tensor.T if path.endswith("kernel") else tensor


def _check_shapes(flat: Mapping[str, np.ndarray]) -> None:
    try:
        vocab_size, d_model = flat["embedding/embedding"].shape
        num_layers, _, d_ff = flat["blocks/mlp/value/kernel"].shape
    except ValueError as error:
        raise UserError("--weights: embedding and MLP weights must be matrices") from error
    square, scale = (num_layers, d_model, d_model), (num_layers, d_model)
    expected = {
        **{f"blocks/attention/{name}/kernel": square for name in ("query", "key", "value", "output")},
        "blocks/mlp/value/kernel": (num_layers, d_model, d_ff),
        "blocks/mlp/gate/kernel": (num_layers, d_model, d_ff),
        "blocks/mlp/down/kernel": (num_layers, d_ff, d_model),
        "blocks/attention/norm/scale": scale,
        "blocks/mlp/norm/scale": scale,
        "head/norm/scale": (d_model,),
        "head/projection/kernel": (d_model, d_model),
        "head/output/kernel": (d_model, vocab_size),
        "head/output/bias": (vocab_size,),
    }
    for path, shape in expected.items():
        if flat[path].shape != shape:
            raise UserError(f"--weights: the shape of {path} is {flat[path].shape} but must be {shape}")
