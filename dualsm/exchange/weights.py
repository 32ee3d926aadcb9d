"""Weights from files that others made, read without running anything that is in them."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import ml_dtypes  # noqa: F401 (it comes with JAX, and gives numpy bfloat16)
import numpy as np

from dualsm.process.errors import UserError

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how torch's files begin, new and old


def read_weights(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by name, as float32, and the strings the file says about itself.

    A safetensors file holds numbers and nothing else. What torch saves is a pickle, which can run anything
    when it is read; such a file is only given to torch's reader that accepts nothing but tensors.

    Raises:
      UserError: for files that are missing, damaged, of another kind, or of more than tensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"--weights: cannot read {path}: {error.strerror or error}") from error
    if start.startswith((_ZIP, _PICKLE)):
        return _read_torch(path), {}
    if start[8:9] == b"{":
        return _read_safetensors(path)
    raise UserError(f"--weights={path} is neither safetensors nor a file that torch saved")


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes tensors as float32; the metadata must be strings."""
    module = _safetensors()
    module.numpy.save_file(
        {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}, path, metadata
    )


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    module = _safetensors()
    try:
        with module.safe_open(path, "np") as file:
            tensors = {name: _float32(file, name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, dict(file.metadata() or {})
    except (module.SafetensorError, TypeError, ValueError, OSError) as error:
        raise UserError(f"--weights={path} is damaged: {error}") from error


def _float32(file, name: str) -> np.ndarray:
    tensor = file.get_tensor(name)
    return tensor if tensor.dtype.kind in "iu" else tensor.astype(np.float32)


def _safetensors():
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise UserError("exchanging weights needs the extra: pip install 'dualsm[exchange]'") from error
    return safetensors


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"--weights={path} is a pickle, which is not read without torch's weights-only reader; "
            "install torch, or give the safetensors file"
        )
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        raise UserError(
            f"--weights={path} is refused by torch's weights-only reader: it is damaged, or holds more than "
            "tensors, which could run anything"
        ) from error
    if not isinstance(loaded, dict) or not all(torch.is_tensor(tensor) for tensor in loaded.values()):
        raise UserError(f"--weights={path} holds more than named tensors; give the model's state_dict")
    return {name: tensor.float().numpy() for name, tensor in loaded.items()}


def read_settings(path: str | Path, metadata: dict[str, str]) -> dict[str, float]:
    """The numbers that tell a model's shape: from a weights file's metadata, else `config.json` beside it.

    Raises:
      UserError: when that `config.json` is no JSON object.
    """
    source: dict = metadata
    beside = Path(path).with_name("config.json")
    if "num_attention_heads" not in metadata and beside.exists():
        try:
            source = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{beside} is no JSON: {error}") from error
        if not isinstance(source, dict):
            raise UserError(f"{beside} is no JSON object")
    return {name: number for name, value in source.items() if (number := _number(value)) is not None}


def _number(value) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
