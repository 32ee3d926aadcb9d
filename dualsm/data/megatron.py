"""Token ids of documents out of Megatron-LM's .bin/.idx pairs.

The .idx file, little-endian: `MMIDIDX` and two zero bytes, version (uint64, 1), code of the type of ids
(uint8), number of sequences and of document borders (uint64 each), the sequences' lengths in tokens (int32),
their places in the .bin file in bytes (int64), and the borders (int64): the numbers of the sequences at which
documents begin, and their end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dualsm.process.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def read_documents(path: str, longest: int) -> Iterator[np.ndarray | None]:
    """Token ids of each document, int64, in the order of the file.

    Args:
      path: the .bin file; its .idx lies beside it.
      longest: documents of more tokens are not read; None stands for them.

    Raises:
      UserError: when the two are damaged or do not fit together.
    """
    index = Path(path).with_suffix(".idx")
    try:
        dtype, length_S, place_S, border_D = _read_index(index.read_bytes())
    except OSError as error:
        raise UserError(f"{path} needs its index {index}: {error.strerror or error}") from error
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{index} is no index of a Megatron-LM dataset, or damaged") from error
    end_S = place_S + length_S.astype(np.int64) * dtype.itemsize
    if len(length_S) and (place_S.min() < 0 or length_S.min() < 0 or end_S.max() > Path(path).stat().st_size):
        raise UserError(f"{path} is shorter than its index {index} says")
    if not len(length_S):
        return
    data = np.memmap(path, np.uint8, "r")
    for first, last in zip(border_D[:-1], border_D[1:], strict=True):
        if length_S[first:last].sum(dtype=np.int64) > longest:
            yield None
            continue
        parts = [data[place_S[s] : end_S[s]].view(dtype) for s in range(first, last)]
        yield np.concatenate([np.empty(0, np.int64), *parts])


def _read_index(content: bytes) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Type of the ids, lengths and places of the sequences, and borders of the documents."""
    magic, version, code, sequences, borders = _HEADER.unpack_from(content)
    if magic != _MAGIC or version != 1:
        raise ValueError("another format")
    at = _HEADER.size
    length_S = np.frombuffer(content, "<i4", sequences, at)
    place_S = np.frombuffer(content, "<i8", sequences, at + length_S.nbytes)
    border_D = np.frombuffer(content, "<i8", borders, at + length_S.nbytes + place_S.nbytes)
    if not len(border_D) or border_D[0] != 0 or border_D[-1] != sequences or (np.diff(border_D) < 0).any():
        raise ValueError("borders of documents out of order")
    return np.dtype(_TYPES[code]), length_S, place_S, border_D
