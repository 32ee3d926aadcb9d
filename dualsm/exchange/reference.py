"""The names and shapes of the paper's released weights (arXiv 2512.14549), and ours, both ways.

Their matrices have outputs as rows, ours inputs; ours are stacked over the layers. Released files hold the
names below; those of this project's fixture have `param.` in front.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

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
# Keys of `config.model` and what the reference calls them.
SETTINGS = {
    "num_layers": "num_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "norm_eps",
}


def to_params(tensors: Mapping[str, np.ndarray]) -> dict:
    """Our parameters, a nested dict, from named tensors.

    Raises:
      UserError: naming what is missing, left over or of a shape that does not fit.
    """
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    layers = sorted({int(m[1]) for name in tensors if (m := re.match(rf"{_LAYERS}\.(\d+)\.", name))})
    numbers = range(max(len(layers), 1))  # and not up to the highest, which may be anything
    wanted = {*OUTER_NAMES.values()}
    wanted |= {f"{_LAYERS}.{i}.{name}" for i in numbers for name in BLOCK_NAMES.values()}
    for problem, names in (("lack", wanted - tensors.keys()), ("hold unknown", tensors.keys() - wanted)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"these are no weights of a reference model: they {problem} {listed}")
    flat = {ours: _turned(ours, tensors[theirs]) for ours, theirs in OUTER_NAMES.items()}
    for ours, theirs in BLOCK_NAMES.items():
        parts = [_turned(ours, tensors[f"{_LAYERS}.{i}.{theirs}"]) for i in layers]
        if len({part.shape for part in parts}) > 1:
            raise UserError(f"{_LAYERS}.*.{theirs} has not the same shape in all layers")
        flat[f"blocks/{ours}"] = np.stack(parts)
    _check_shapes(flat)
    return _nested(flat)


def from_params(params: dict) -> dict[str, np.ndarray]:
    """Named tensors, as the released files have them, from our parameters."""
    flat = flatten(params)
    tensors = {theirs: _turned(ours, flat[ours]) for ours, theirs in OUTER_NAMES.items()}
    for ours, theirs in BLOCK_NAMES.items():
        for i, part in enumerate(flat[f"blocks/{ours}"]):
            tensors[f"{_LAYERS}.{i}.{theirs}"] = _turned(ours, part)
    return tensors


def model_settings(params: dict, told: Mapping[str, float]) -> dict[str, int | float | str]:
    """Values of `config.model`: what the weights' shapes say, and what only `told` can.

    Args:
      params: from `to_params`.
      told: numbers by the reference's names; see `SETTINGS`.

    Returns:
      Keys of `config.model`, without those that nobody told.

    Raises:
      UserError: when `told` contradicts the weights.
    """
    flat = flatten(params)
    layers, width, d_ff = flat["blocks/mlp/value/kernel"].shape
    shown = {"num_layers": layers, "d_model": width, "d_ff": d_ff}
    for key, value in shown.items():
        if told.get(SETTINGS[key], value) != value:
            raise UserError(
                f"{SETTINGS[key]} is said to be {told[SETTINGS[key]]:g}, but the weights have {value}"
            )
    settings = {key: told[name] for key, name in SETTINGS.items() if name in told}
    if "num_heads" in settings:
        if settings["num_heads"] not in range(1, width + 1):
            name, value = SETTINGS["num_heads"], settings["num_heads"]
            raise UserError(f"{name}={value:g} must be an integer from 1 to {width}")
        settings["num_heads"] = int(settings["num_heads"])
    return settings | shown | {"head": "projected"}


def flatten(params: Mapping, prefix: str = "") -> dict[str, np.ndarray]:
    """Parameters by their path, as "blocks/mlp/norm/scale"."""
    flat = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: np.asarray(value)}
    return flat


def _nested(flat: Mapping[str, np.ndarray]) -> dict:
    params: dict = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return params


def _turned(ours: str, tensor: np.ndarray) -> np.ndarray:
    """A matrix the other way round; other tensors as they are."""
    return tensor.T if ours.endswith("kernel") else tensor


def _check_shapes(flat: Mapping[str, np.ndarray]) -> None:
    try:
        vocab_size, width = flat["embedding/embedding"].shape
        layers, _, inner = flat["blocks/mlp/value/kernel"].shape
    except ValueError as error:
        raise UserError("embedding and MLP weights must be matrices") from error
    square, scale = (layers, width, width), (layers, width)
    expected = {
        **{f"blocks/attention/{name}/kernel": square for name in ("query", "key", "value", "output")},
        "blocks/mlp/value/kernel": (layers, width, inner),
        "blocks/mlp/gate/kernel": (layers, width, inner),
        "blocks/mlp/down/kernel": (layers, inner, width),
        "blocks/attention/norm/scale": scale,
        "blocks/mlp/norm/scale": scale,
        "head/norm/scale": (width,),
        "head/projection/kernel": (width, width),
        "head/output/kernel": (width, vocab_size),
        "head/output/bias": (vocab_size,),
    }
    for path, shape in expected.items():
        if flat[path].shape != shape:
            raise UserError(f"the weights of {path} have the shape {flat[path].shape}, not {shape}")
