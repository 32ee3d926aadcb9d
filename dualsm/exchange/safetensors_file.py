"""Safetensors files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dualsm.exchange.tensor_info import TensorInfo, widened
from dualsm.process.errors import UserError


class SafetensorsFile:
    """Reads the tensors of a safetensors file, one at a time.

    Attributes:
      tensors: shape and type of each tensor by name.
      metadata: metadata of the file.
      ignored: always empty; see `TorchFile`.
    """

    ignored: tuple[str, ...] = ()

    def __init__(self, path: Path):
        """Reads names, shapes and types. Raises `UserError` if the file is damaged."""
        self._path = path
        with self._open() as file:
            self.metadata = dict(file.metadata() or {})
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            self.tensors = {
                name: TensorInfo(tuple(part.get_shape()), str(part.get_dtype()))
                for name, part in slices.items()
            }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads a tensor, or its rows from `start` to `stop`; see `Weights.read`."""
        with self._open() as file:  # opened each time, because a mapped file counts as memory of the process
            if start == 0 and stop is None:
                return widened(file.get_tensor(name))
            return widened(file.get_slice(name)[start:stop])

    @contextmanager
    def _open(self) -> Iterator:
        module = load_safetensors()
        try:
            with module.safe_open(self._path, "np") as file:
                yield file
        except (module.SafetensorError, TypeError, ValueError, OSError) as error:
            raise UserError(f"--weights={self._path} is damaged ({error}); download it again") from error


def load_safetensors():
    """Returns the module safetensors. Raises `UserError` if it is not installed."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise UserError("safetensors is not installed; run pip install 'dualsm[exchange]'") from error
    return safetensors
