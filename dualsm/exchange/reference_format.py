"""Names and settings of the paper's released weights (arXiv 2512.14549).

Their code writes a state dict whose names depend on the wrappers around the model and on whether projections
are fused; config files use several names for one setting.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from dualsm.exchange.parameter_sources import Source
from dualsm.exchange.switches import switched_on
from dualsm.exchange.tensor_info import TensorInfo
from dualsm.process.errors import UserError

_PREFIXES = ("model", "module", "param", "_orig_mod")  # of wrappers and of dictionaries around the state dict
_ANYWHERE = "_orig_mod"  # also around a part of the model
_MODULES = ("encoder", "embedding", "classifier")  # parts of the model
_LAYERS = "encoder.layers"
_FUSED = {"qkv_proj": 3, "up_proj": 2}  # projections that can be one tensor, in the order of their parts
_ROPE = {"inv_freq", "cos_matrix", "sin_matrix", "cos_cached", "sin_cached", "rope_cos", "rope_sin"}

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
# Keys of `config.model`, and their names in config files; exports use the first one.
SETTINGS = {
    "num_layers": ("num_layers", "num_hidden_layers"),
    "d_model": ("hidden_size",),
    "num_heads": ("num_attention_heads",),
    "d_ff": ("intermediate_size",),
    "rope_theta": ("rope_theta",),
    "norm_eps": ("norm_eps", "layer_norm_eps", "rms_norm_eps"),
}
_HEAD_DIM = ("d_h", "query_key_head_size", "head_dim")
_SEQ_LEN = ("max_sequence_length", "max_position_embeddings")


def parameter_sources(
    tensors: Mapping[str, TensorInfo],
) -> tuple[dict[str, Source | list[Source]], list[str]]:
    """Finds the tensors of each parameter.

    Returns:
      sources: see `dualsm.exchange.parameter_sources`.
      dropped: names of RoPE and integer buffers, which the parameters do not need.

    Raises:
      UserError: if tensors are missing, unknown or named twice.
    """
    original: dict[str, str] = {}
    for name in tensors:
        if (known := original.setdefault(_without_prefixes(name), name)) != name:
            raise UserError(f"--weights: {known} and {name} are the same tensor of the model; remove one")
    dropped = [short for short in original if _is_buffer(short, tensors[original[short]])]
    parts = _parts({short: tensors[name] for short, name in original.items() if short not in dropped})
    layers = sorted({int(m[1]) for name in parts if (m := re.match(rf"{_LAYERS}\.(\d+)\.", name))})
    numbers = range(max(len(layers), 1))  # not up to the highest number, which a damaged file may make huge
    expected = {*OUTER_NAMES.values()}
    expected |= {f"{_LAYERS}.{i}.{name}" for i in numbers for name in BLOCK_NAMES.values()}
    for problem, names in (("missing", expected - parts.keys()), ("unknown", parts.keys() - expected)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"--weights: not a reference model, {problem} tensors: {listed}; pass the released state dict"
            )
    found = {name: part._replace(name=original[part.name]) for name, part in parts.items()}
    sources: dict[str, Source | list[Source]] = {path: found[name] for path, name in OUTER_NAMES.items()}
    for path, name in BLOCK_NAMES.items():
        sources[f"blocks/{path}"] = [found[f"{_LAYERS}.{i}.{name}"] for i in layers]
    return sources, [original[short] for short in dropped]


def model_settings(
    sources: Mapping[str, Source | list[Source]],
    tensors: Mapping[str, TensorInfo],
    declared: Mapping[str, float],
) -> dict[str, int | float | str]:
    """Returns the values of `config.model` for given weights.

    Args:
      sources: from `parameter_sources`.
      tensors: shape of each tensor; they determine num_layers, d_model and d_ff.
      declared: numbers by their names in config files, see `SETTINGS`; they determine the others.

    Returns:
      Values by key of `config.model`, without the keys that `declared` lacks.

    Raises:
      UserError: if `declared` contradicts the weights or itself.
    """
    down = sources["blocks/mlp/down/kernel"]
    shape = tensors[down[0].name].shape
    if len(shape) != 2:
        raise UserError(f"--weights: {down[0].name} must be a matrix, but its shape is {shape}")
    from_shapes = {"num_layers": len(down), "d_model": shape[0], "d_ff": shape[1]}
    settings: dict[str, int | float | str] = {"head": "projected"}
    for key, names in SETTINGS.items():
        name, value = _declared(declared, names)
        if key in from_shapes and value is not None and value != from_shapes[key]:
            found = from_shapes[key]
            raise UserError(f"{name}={value:g} but the weights have {found}; pass their config.json")
        if value is not None:
            settings[key] = value
    settings |= from_shapes
    _set_num_heads(settings, declared)
    return settings


def sequence_length(declared: Mapping[str, float]) -> int | None:
    """Returns the sequence length of the weights' training, or None if `declared` lacks it."""
    name, value = _declared(declared, _SEQ_LEN)
    if value is not None and (value != int(value) or value < 1):
        raise UserError(f"{name}={value:g} must be a positive integer; fix config.json")
    return None if value is None else int(value)


def from_params(params: dict) -> dict[str, np.ndarray]:
    """Converts dualsm's parameters to the named tensors of the released files."""
    flat = traverse_util.flatten_dict(params, sep="/")
    tensors = {name: _transposed(path, np.asarray(flat[path])) for path, name in OUTER_NAMES.items()}
    for path, name in BLOCK_NAMES.items():
        for i, part in enumerate(np.asarray(flat[f"blocks/{path}"])):
            tensors[f"{_LAYERS}.{i}.{name}"] = _transposed(path, part)
    return tensors


def _without_prefixes(name: str) -> str:
    """Removes the names of wrappers from the name of a tensor."""
    parts = [part for part in name.split(".") if part != _ANYWHERE]
    while len(parts) > 1 and parts[0] in _PREFIXES:
        del parts[0]
    return ".".join(parts)


def _is_buffer(name: str, info: TensorInfo) -> bool:
    """Returns True for tables of the rotary embedding, and for integers inside a part of the model."""
    parts = name.split(".")
    return parts[-1] in _ROPE or (parts[0] in _MODULES and info.is_integer)


def _parts(tensors: Mapping[str, TensorInfo]) -> dict[str, Source]:
    """Returns projection -> source; a tensor of fused projections is the source of several."""
    found = {}
    for name, info in tensors.items():
        count = next((count for fused, count in _FUSED.items() if name.endswith(f".{fused}.weight")), 1)
        rows = info.shape[0] if info.shape else 0
        if count == 1:
            found[name] = Source(name)
        elif rows % count:
            raise UserError(f"--weights: {name} has {rows} rows, which {count} projections cannot share")
        else:
            size = rows // count
            parts = {f"{name}s.{i}": Source(name, i * size, (i + 1) * size) for i in range(count)}
            if twice := sorted(parts.keys() & tensors.keys()):
                raise UserError(f"--weights: {name} and {twice[0]} are the same projection; remove one")
            found |= parts
    return found


def _declared(declared: Mapping[str, float], names: tuple[str, ...]) -> tuple[str, float | None]:
    """Returns the value of a setting and its name. Raises `UserError` if it has several values."""
    found = {name: declared[name] for name in names if name in declared}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name}={value:g}" for name, value in found.items())
        raise UserError(f"config.json: {listed} contradict each other; pass the config.json of the weights")
    return next(iter(found.items()), (names[0], None))


def _set_num_heads(settings: dict, declared: Mapping[str, float]) -> None:
    """Sets the number of heads, also from the size of a head. Raises `UserError` if they contradict."""
    d_model = settings["d_model"]
    width_name, width = _declared(declared, _HEAD_DIM)
    if width is not None and (width not in range(2, d_model + 1) or d_model % width):
        raise UserError(f"{width_name}={width:g} must divide d_model={d_model}")
    name, value = SETTINGS["num_heads"][0], settings.get("num_heads")
    if value is not None and value not in range(1, d_model + 1):
        raise UserError(f"{name}={value:g} must be an integer from 1 to {d_model}")
    if value is not None and width is not None and value * width != d_model:
        raise UserError(
            f"{name}={value:g} times {width_name}={width:g} must be {d_model}, the d_model of the weights; "
            "pass the config.json of the weights"
        )
    if value is not None or width is not None:
        settings["num_heads"] = int(d_model // width if value is None else value)


def _transposed(path: str, tensor: np.ndarray) -> np.ndarray:
    """Transposes matrices; returns other tensors, and the embedding, unchanged."""
    return tensor.T if path.endswith("kernel") else tensor


def check_switches(model: ConfigDict, advice: str) -> None:
    """Raises `UserError`, with advice, if `config.model` has a switch that the format lacks."""
    if keys := switched_on(model):
        raise UserError(f"the reference format does not support config.model.{keys[0]}; {advice}")
