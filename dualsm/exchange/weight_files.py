"""Reading and writing weight files; reading never executes code that a file contains."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import ml_dtypes  # noqa: F401 (registers bfloat16 with numpy)
import numpy as np

from dualsm.process.errors import UserError

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of files saved by torch, current and legacy


def read_weights(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file, or a state dict that torch saved.

    Files saved by torch are pickles, which can execute code; they are only read with `weights_only=True`.

    Returns:
      Tensors by name, floating-point ones as float32, and the metadata of a safetensors file.

    Raises:
      UserError: if the file is missing, damaged, of another type, or contains more than tensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(
            f"--weights: cannot read {path}: {error.strerror or error}; check the path"
        ) from error
    if start.startswith((_ZIP, _PICKLE)):
        return _read_torch(path), {}
    if start[8:9] == b"{":
        return _read_safetensors(path)
    raise UserError(f"--weights={path} is neither safetensors nor saved by torch; convert it to safetensors")


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes tensors as float32."""
    module = _safetensors()
    module.numpy.save_file(
        {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}, path, metadata
    )


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    module = _safetensors()
    try:
        with module.safe_open(path, "np") as file:
            tensors = {name: _float32(file, name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, dict(file.metadata() or {})
    except (module.SafetensorError, TypeError, ValueError, OSError) as error:
        raise UserError(f"--weights={path} is damaged ({error}); download it again") from error


def _float32(file, name: str) -> np.ndarray:
    tensor = file.get_tensor(name)
    return tensor if tensor.dtype.kind in "iu" else tensor.astype(np.float32)


def _safetensors():
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise UserError("safetensors is not installed; run pip install 'dualsm[exchange]'") from error
    return safetensors


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"--weights={path} is a pickle, which only torch's weights-only reader can read safely; "
            "install torch, or give a safetensors file"
        )
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or malicious file can raise anything
        raise UserError(
            f"--weights={path}: torch's weights-only reader rejects the file; it is damaged or contains more "
            "than tensors; give a state_dict or a safetensors file"
        ) from error
    if not isinstance(loaded, dict) or not all(torch.is_tensor(tensor) for tensor in loaded.values()):
        raise UserError(f"--weights={path} contains more than named tensors; give the model's state_dict")
    return {name: tensor.float().numpy() for name, tensor in loaded.items()}


def read_settings(path: str | Path, metadata: dict[str, str]) -> dict[str, float]:
    """Reads numeric model settings from the metadata of a weight file, or from `config.json` in its folder.

    Args:
      path: weight file.
      metadata: its metadata, used if it has `num_attention_heads`.

    Raises:
      UserError: if `config.json` is not a JSON object.
    """
    source: dict = metadata
    beside = Path(path).with_name("config.json")
    if "num_attention_heads" not in metadata and beside.exists():
        try:
            source = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{beside} is not valid JSON ({error}); fix or remove it") from error
        if not isinstance(source, dict):
            raise UserError(f"{beside} is not a JSON object; fix or remove it")
    return {name: number for name, value in source.items() if (number := _number(value)) is not None}


def _number(value) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
