"""Token ids of documents in Megatron-LM's .bin/.idx files.

Layout of the .idx file, little-endian: `MMIDIDX` and two zero bytes, version (uint64, 1), code of the token
dtype (uint8), number of sequences and of document boundaries (uint64 each), length of each sequence in tokens
(int32), byte offset of each sequence in the .bin file (int64), and the boundaries (int64): the index of the
first sequence of each document, and the number of sequences.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dualsm.process.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def read_documents(path: str, max_tokens: int, name: str = "") -> Iterator[np.ndarray | None]:
    """Yields the token ids of each document, int64, in the order of the file.

    Args:
      path: the .bin file, with its .idx file in the same folder.
      max_tokens: longer documents are not read; None is yielded for them.
      name: path for messages, if `path` is a temporary copy.

    Raises:
      UserError: if one of the files is damaged, or they do not match.
    """
    name, index = name or path, Path(path).with_suffix(".idx")
    try:
        dtype, length_S, offset_S, boundary_D = _read_index(index.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot read {index.name}, the index of {name}: {error.strerror or error}"
        ) from error
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise UserError(
            f"{index.name}, the index of {name}, is damaged or not a Megatron-LM index ({error!r}); copy it "
            "again"
        ) from error
    end_S = offset_S + length_S.astype(np.int64) * dtype.itemsize
    if len(length_S) and (
        offset_S.min() < 0 or length_S.min() < 0 or end_S.max() > Path(path).stat().st_size
    ):
        raise UserError(f"{name} is shorter than its index {index.name} states; copy both files again")
    if not len(length_S):
        return
    data = np.memmap(path, np.uint8, "r")
    for first, last in itertools.pairwise(boundary_D):
        if length_S[first:last].sum(dtype=np.int64) > max_tokens:
            yield None
            continue
        sequences = [data[offset_S[s] : end_S[s]].view(dtype) for s in range(first, last)]
        yield np.concatenate([np.empty(0, np.int64), *sequences])


def _read_index(content: bytes) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the token dtype, the lengths and byte offsets of sequences, and the document boundaries."""
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack_from(content)
    if magic != _MAGIC or version != 1:
        raise ValueError("unknown format or version")
    start = _HEADER.size
    length_S = np.frombuffer(content, "<i4", num_sequences, start)
    offset_S = np.frombuffer(content, "<i8", num_sequences, start + length_S.nbytes)
    start += length_S.nbytes + offset_S.nbytes
    boundary_D = np.frombuffer(content, "<i8", num_boundaries, start)
    if (
        not num_boundaries
        or boundary_D[0]
        or boundary_D[-1] != num_sequences
        or (np.diff(boundary_D) < 0).any()
    ):
        raise ValueError("invalid document boundaries")
    return np.dtype(_DTYPES[code]), length_S, offset_S, boundary_D
