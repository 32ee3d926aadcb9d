"""Parameters from weight files: the tensors of each parameter, and reading them one at a time.

Matrices in weight files are [outputs, inputs], and each layer has its own tensors. dualsm's matrices are
[inputs, outputs] and stacked over layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from dualsm.exchange import token_ids
from dualsm.exchange.weight_files import Weights
from dualsm.process.errors import UserError


class Source(NamedTuple):
    """The tensor that contains a parameter or one layer of it, and its rows in this tensor."""

    name: str
    start: int = 0
    stop: int | None = None


# By path of the parameter, such as "blocks/mlp/down/kernel": its source, or one per layer.
Sources = Mapping[str, Source | Sequence[Source]]


def load_params(
    weights: Weights, sources: Sources, abstract_params: dict, external_ids_V: np.ndarray
) -> dict:
    """Reads parameters one at a time and converts them to internal ids.

    Host memory contains only one parameter at a time, besides those that are already on the devices.

    Args:
      weights: opened weights.
      sources: tensors of each parameter.
      abstract_params: shapes and shardings of the parameters, a nested dict.
      external_ids_V: see `Tokenizer`.

    Raises:
      UserError: if tensors have the wrong shape or type, or a file is damaged.
    """
    flat = traverse_util.flatten_dict(abstract_params, sep="/")
    _check(weights, sources, flat)
    loaded = {}
    for path, leaf in flat.items():
        array = _parameter(weights, sources[path], path, leaf.shape, external_ids_V)
        loaded[path] = jax.block_until_ready(jax.device_put(array, leaf.sharding))
        del array  # before the next one is allocated
    return traverse_util.unflatten_dict(loaded, sep="/")


def num_ids(weights: Weights, sources: Sources) -> int:
    """Returns the number of rows of the embedding. Raises `UserError` if it is not a matrix."""
    info = weights.tensors[sources["embedding/embedding"].name]
    if len(info.shape) != 2:
        raise UserError(
            f"--weights: the embedding has the shape {info.shape} but must be a matrix; pass other weights"
        )
    return info.shape[0]


def _parameter(
    weights: Weights, source: Source | Sequence[Source], path: str, shape: tuple[int, ...], external_ids_V
) -> np.ndarray:
    if path in token_ids.VOCABULARY_AXIS:
        return token_ids.internal_array(path, _read(weights, source, path), external_ids_V)
    array = np.empty(shape, np.float32)
    if isinstance(source, Source):
        array[...] = _read(weights, source, path)
    else:
        for layer, part in enumerate(source):
            array[layer] = _read(weights, part, path)
    return array


def _read(weights: Weights, source: Source, path: str) -> np.ndarray:
    tensor = weights.read(*source)
    return tensor.T if path.endswith("kernel") else tensor


def _check(weights: Weights, sources: Sources, flat: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Checks the types and shapes of all tensors."""
    if sources.keys() != flat.keys():
        raise ValueError(f"sources and parameters differ: {sorted(sources.keys() ^ flat.keys())}")
    vocab_size = num_ids(weights, sources)
    for path, leaf in flat.items():
        source = sources[path]
        layered = not isinstance(source, Source)
        expected = list(leaf.shape[1:] if layered else leaf.shape)
        if path in token_ids.VOCABULARY_AXIS:
            expected[token_ids.VOCABULARY_AXIS[path]] = vocab_size
        if path.endswith("kernel"):
            expected.reverse()
        if layered and len(source) != leaf.shape[0]:
            raise ValueError(f"{path} has {len(source)} sources for {leaf.shape[0]} layers")
        for part in source if layered else [source]:
            _check_tensor(weights, part, tuple(expected))


def _check_tensor(weights: Weights, source: Source, expected: tuple[int, ...]) -> None:
    info = weights.tensors[source.name]
    if not info.is_floating:
        raise UserError(
            f"--weights: {source.name} has the type {info.dtype}; only F32, BF16, F16 and F64 are supported"
        )
    start, stop, _ = slice(source.start, source.stop).indices(info.shape[0] if info.shape else 0)
    found = info.shape if (source.start, source.stop) == (0, None) else (stop - start, *info.shape[1:])
    if found != expected:
        rows = "" if found == info.shape else f", of which the rows {source.start} to {source.stop}"
        raise UserError(
            f"--weights: the shape of {source.name} is {info.shape}{rows} but must be {expected}; "
            "pass the config.json that belongs to the weights"
        )
