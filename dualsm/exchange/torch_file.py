"""Files that torch saved, read without torch and without executing code that they contain.

Such a file is a zip archive: a pickle that names the tensors, and one entry of raw bytes per storage. The
unpickler here constructs only dictionaries and descriptions of tensors. It rejects every other class or
function that the pickle names before anything is called.
"""

from __future__ import annotations

import collections
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dualsm.exchange.tensor_info import DTYPES, TensorInfo, widened
from dualsm.process.errors import UserError

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_CHUNK = 1 << 24  # bytes per read; `readinto` of a zip entry allocates as much
_DAMAGE = (zipfile.BadZipFile, pickle.UnpicklingError, OSError, EOFError, ValueError, TypeError, KeyError,
           AttributeError, IndexError, OverflowError, RecursionError, MemoryError, UnicodeError,
           NotImplementedError)  # fmt: skip


class _Storage(NamedTuple):
    entry: str
    dtype: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """Reads the tensors of a file written by `torch.save`, one at a time.

    Attributes:
      tensors: shape and type of each tensor by name. If the saved dictionary has the key "model", these are
        the tensors under it.
      metadata: always empty; see `SafetensorsFile`.
      ignored: names of entries that are not used, such as an optimizer's state.
    """

    def __init__(self, path: Path):
        """Reads names, shapes and types.

        Raises:
          UserError: if the file is damaged, or contains more than dictionaries, tensors and plain values.
        """
        self._path, self.metadata = path, {}
        self._tensors, ignored = {}, []
        try:
            with zipfile.ZipFile(path) as archive:
                sizes = {info.filename: info.file_size for info in archive.infolist()}
                (pickled,) = (name for name in sizes if name.endswith("/data.pkl"))
                folder = pickled.removesuffix("data.pkl")
                if folder + "byteorder" in sizes and archive.read(folder + "byteorder") != b"little":
                    raise ValueError("its byte order is not little-endian")
                with archive.open(pickled) as file:
                    content = _Unpickler(file, folder).load()
            if not isinstance(content, Mapping):
                raise ValueError(f"it contains a {type(content).__name__}, not a dictionary")
            if isinstance(content.get("model"), Mapping):  # a checkpoint of a training run
                ignored = [str(name) for name in content if name != "model"]
                content = content["model"]
            for name, value in content.items():
                if isinstance(value, _Tensor):
                    _check_bounds(value, sizes[value.storage.entry])
                    self._tensors[str(name)] = value
                else:
                    ignored.append(str(name))
            if not self._tensors:
                raise ValueError("it has no named tensors")
        except _DAMAGE as error:
            raise UserError(
                f"--weights={path}: the weights-only reader rejects the file ({error}); it is damaged or "
                "contains more than tensors; pass a state_dict of torch 1.6 or later, or a safetensors file"
            ) from error
        self.ignored = tuple(ignored)
        self.tensors = {
            name: TensorInfo(tensor.shape, tensor.storage.dtype) for name, tensor in self._tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads a tensor, or its rows from `start` to `stop`; see `Weights.read`."""
        tensor = self._tensors[name]
        shape, offset = tensor.shape, tensor.offset
        if shape:
            start, stop, _ = slice(start, stop).indices(shape[0])
            shape, offset = (max(stop - start, 0), *shape[1:]), offset + start * tensor.strides[0]
        span = _span(shape, tensor.strides)
        data = np.empty(span, DTYPES[tensor.storage.dtype])
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(tensor.storage.entry) as file:
                file.seek(offset * data.itemsize)
                left = memoryview(data.view(np.uint8))
                while left:
                    count = file.readinto(left[:_CHUNK])
                    if not count:
                        raise EOFError(f"{name} ends early")
                    left = left[count:]
        except _DAMAGE as error:
            raise UserError(f"--weights={self._path} is damaged ({error}); download it again") from error
        strides = [stride * data.itemsize for stride in tensor.strides]
        return widened(np.lib.stride_tricks.as_strided(data, shape, strides, writeable=False))


class _Unpickler(pickle.Unpickler):
    """Constructs dictionaries and descriptions of tensors, and nothing else."""

    def __init__(self, file, folder: str):
        super().__init__(file)
        self._folder = folder

    def find_class(self, module: str, name: str):
        """Returns the replacement of one of torch's names; raises `UnpicklingError` for other names."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid) -> _Storage:
        """Returns the description of a storage."""
        kind, dtype, key, _, size = pid
        if kind != "storage" or dtype not in DTYPES:
            raise pickle.UnpicklingError(f"it refers to {kind}")
        return _Storage(f"{self._folder}data/{key}", dtype, int(size))


def _rebuild_tensor(storage: _Storage, offset: int, shape, strides, *_) -> _Tensor:
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor: _Tensor, *_) -> _Tensor:
    return tensor


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Returns the number of storage elements from the first to the last element of a tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _check_bounds(tensor: _Tensor, stored_bytes: int) -> None:
    """Raises `ValueError` if a tensor uses memory outside its storage."""
    storage = tensor.storage
    itemsize = DTYPES[storage.dtype].itemsize
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    end = tensor.offset + _span(tensor.shape, tensor.strides)
    # A stride of 0 would describe a tensor larger than the file.
    too_many = math.prod(tensor.shape) * itemsize > max(stored_bytes, itemsize)
    if min(numbers) < 0 or end * itemsize > stored_bytes or too_many:
        raise ValueError("a tensor is outside its storage")
