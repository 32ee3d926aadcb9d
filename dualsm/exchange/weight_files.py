"""Reading and writing weight files; tensors are read one at a time, after names, shapes and types.

A model is one file or several shards with an index. Reading never executes code that a file contains.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dualsm.data.verification import sha256
from dualsm.exchange.safetensors_file import SafetensorsFile, load_safetensors
from dualsm.exchange.tensor_info import DTYPES, TensorInfo
from dualsm.exchange.torch_file import TorchFile
from dualsm.process.errors import UserError

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of files saved by torch, current and legacy
INDEX = ".index.json"
# Names of weights in a folder, in order of preference.
FILE_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "state_dict.safetensors",
    "state_dict.bin",
)


class Weights:
    """Reads the tensors of a model, one at a time.

    Attributes:
      path: file that was opened; with several shards, the index.
      tensors: shape and type of each tensor by name.
      metadata: metadata of the (first) file.
      ignored: names of entries that are not tensors.
    """

    def __init__(self, path: Path, files: Mapping[Path, SafetensorsFile | TorchFile]):
        """
        Args:
          files: path -> file; no two files have a tensor of the same name.
        """
        self.path, self._paths = path, tuple(files)
        self._file_of = {name: file for file in files.values() for name in file.tensors}
        self.tensors: dict[str, TensorInfo] = {
            name: info for file in files.values() for name, info in file.tensors.items()
        }
        self.metadata = next(iter(files.values())).metadata
        self.ignored = tuple(name for file in files.values() for name in file.ignored)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads one tensor into memory.

        Args:
          name: a key of `tensors`.
          start: first row along the first axis.
          stop: end of the rows; None: all from `start` on.

        Returns:
          The tensor; float32 if `TensorInfo.is_floating`. It may be read-only.

        Raises:
          UserError: if the file is damaged.
        """
        return self._file_of[name].read(name, start, stop)

    def sha256(self) -> str:
        """Returns the SHA-256 of the file; for shards, that of the output of `sha256sum` for all of them."""
        if len(self._paths) == 1:
            return sha256(self._paths[0])
        lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(self._paths)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_weights(path: str | Path) -> Weights:
    """Opens weights without reading any tensor.

    Args:
      path: safetensors file, file saved by torch, index of several such files, or a folder with one of
        `FILE_NAMES`.

    Raises:
      UserError: if a file is missing, damaged, of another type, or contains code or other objects.
    """
    path = Path(path)
    if path.is_dir():
        path = _find_in_folder(path)
    if path.name.endswith(INDEX):
        return Weights(path, _open_shards(path))
    return Weights(path, {path: _open_file(path)})


def _find_in_folder(folder: Path) -> Path:
    for name in FILE_NAMES:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"--weights={folder} contains none of {', '.join(FILE_NAMES)}; name the file")


def _open_file(path: Path) -> SafetensorsFile | TorchFile:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(
            f"--weights: cannot read {path}: {error.strerror or error}; check the path"
        ) from error
    if start[8:9] == b"{" and not start.startswith(_ZIP):  # after a length, which may look like a pickle
        return SafetensorsFile(path)
    if start.startswith((_ZIP, _PICKLE)):
        return TorchFile(path)
    raise UserError(f"--weights={path} is neither safetensors nor saved by torch; convert it to safetensors")


def _open_shards(index: Path) -> dict[Path, SafetensorsFile | TorchFile]:
    """Opens the shards of an index after checking that index and shards agree."""
    weight_map = read_json_object(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise UserError(f"--weights={index} has no weight_map; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise UserError(f"--weights={index}: {name} is in {shard!r}, which is not a file in its folder")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise UserError(f"--weights={index}: shard {missing[0]} is missing; download it again")
    files = {index.parent / shard: _open_file(index.parent / shard) for shard in shards}
    for path, file in files.items():
        named = {name for name, shard in weight_map.items() if shard == path.name}
        different = sorted(named ^ file.tensors.keys())
        if different:
            problem = "lacks" if different[0] in named else "contains, unlike the index says,"
            raise UserError(f"--weights={path} {problem} {different[0]}; download index and shards again")
    return files


def write_safetensors(
    path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str], dtype: str = "F32"
) -> None:
    """Writes tensors, converted to one type; `dtype` is a key of `DTYPES`."""
    converted = {name: np.asarray(tensor, DTYPES[dtype], order="C") for name, tensor in tensors.items()}
    load_safetensors().numpy.save_file(converted, path, metadata)


def read_json_object(path: Path) -> dict:
    """Reads a JSON object. Raises `UserError` if the file is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fix or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; fix or remove it")
    return content


def read_settings(weights: Weights) -> dict[str, float]:
    """Reads numeric model settings from the metadata of weights, or from `config.json` in their folder.

    The metadata is used if it has `num_attention_heads`. Raises `UserError` if `config.json` is not a JSON
    object.
    """
    source: dict = weights.metadata
    beside = weights.path.with_name("config.json")
    if "num_attention_heads" not in source and beside.exists():
        source = read_json_object(beside)
    return {name: number for name, value in source.items() if (number := _number(value)) is not None}


def _number(value) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
