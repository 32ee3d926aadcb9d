"""Shape and type of a tensor in a weight file."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

# Types by their names in safetensors files. Tensors of other types are listed but not read.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class TensorInfo(NamedTuple):
    """Shape of a tensor, and the name of its type in safetensors files."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_floating(self) -> bool:
        """Returns True for the floating-point types that can be read."""
        return self.dtype in ("F64", "F32", "F16", "BF16")

    @property
    def is_integer(self) -> bool:
        """Returns True for integers and booleans."""
        return self.dtype in DTYPES and not self.is_floating


def widened(tensor: np.ndarray) -> np.ndarray:
    """Converts floating-point tensors to float32; returns other tensors unchanged."""
    return tensor if tensor.dtype.kind in "iub" else tensor.astype(np.float32, copy=False)
