"""Writes weights as one safetensors file, or as several with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dualsm.exchange.weight_files import write_safetensors
from dualsm.process.errors import UserError

MAX_SHARD_BYTES = 5 * 10**9  # as in transformers 4
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # names in safetensors files
_METADATA = {"format": "pt"}


def write_shards(
    folder: Path, tensors: Mapping[str, np.ndarray], dtype: str, max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes `model.safetensors`, or shards and `model.safetensors.index.json` as transformers does.

    Only the tensors of one file are converted at a time.

    Args:
      folder: folder to write to.
      tensors: tensors by name.
      dtype: type in the files, a key of `DTYPES`.
      max_bytes: maximum size of the tensors in a file; a larger tensor gets a separate file.

    Raises:
      UserError: if a number is not representable in the type.
    """
    if dtype == "float16":
        for name, tensor in tensors.items():
            if np.abs(tensor).max(initial=0) > np.finfo(np.float16).max:
                raise UserError(f"--dtype=float16 cannot represent the numbers of {name}; use bfloat16")
    item = {"float32": 4}.get(dtype, 2)
    shards = _divide({name: tensor.size * item for name, tensor in tensors.items()}, max_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(folder / file, {name: tensors[name] for name in shard}, _METADATA, DTYPES[dtype])
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.size * item for tensor in tensors.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _divide(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Divides names into consecutive groups of at most `max_bytes`."""
    shards: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if shards[-1] and total + size > max_bytes:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards
