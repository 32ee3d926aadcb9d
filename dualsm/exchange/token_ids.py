"""Renumbering of token ids in the embedding and the output layer.

dualsm reserves its first ids for special tokens, for every tokenizer (dualsm/data/tokenizer_json.py). The
`external_ids_V` of a tokenizer map these internal ids to the external ids of its file; -1 means none.
"""

from __future__ import annotations

import numpy as np
from flax import traverse_util

from dualsm.data.tokenizer import RESERVED_IDS, Tokenizer
from dualsm.data.tokenizer_json import JsonTokenizer
from dualsm.model import id_ranges
from dualsm.process.errors import UserError

# Parameters with an axis of token ids, and that axis.
VOCABULARY_AXIS = {"embedding/embedding": 0, "head/output/kernel": 1, "head/output/bias": 0}
_NOISE = 0.02  # of the rows of ids that imported weights lack, over the standard deviation of all rows
_CHUNK = 4096  # ids whose rows are copied together


def internal_array(path: str, array: np.ndarray, external_ids_V: np.ndarray) -> np.ndarray:
    """Converts a parameter of `VOCABULARY_AXIS` from external to internal ids.

    The rows of ids that the weights lack are the mean of all rows plus small noise.

    Args:
      path: key of `VOCABULARY_AXIS`.
      array: parameter whose vocabulary axis has external ids.
      external_ids_V: see `Tokenizer`.

    Returns:
      A new float32 array.

    Raises:
      UserError: if the tokenizer has pieces of text whose ids the weights lack.
    """
    axis = VOCABULARY_AXIS[path]
    size = array.shape[axis]
    if external_ids_V[RESERVED_IDS:].max() >= size:  # the weights may lack special tokens, but no text
        raise UserError(
            f"the tokenizer has {external_ids_V.max() + 1} ids but the weights have {size}; "
            "pass the tokenizer that belongs to the weights"
        )
    known_V = (external_ids_V >= 0) & (external_ids_V < size)
    shape = list(array.shape)
    shape[axis] = len(external_ids_V)
    found = np.empty(shape, np.float32)
    by_id, from_id = np.moveaxis(found, axis, 0), np.moveaxis(array, axis, 0)
    known, unknown = np.flatnonzero(known_V), np.flatnonzero(~known_V)
    for part in np.split(known, range(_CHUNK, len(known), _CHUNK)):  # indexing copies
        by_id[part] = from_id[external_ids_V[part]]
    mean, std = from_id.mean(0, dtype=np.float32), from_id.std(dtype=np.float32)
    noise = np.random.default_rng(0).standard_normal((len(unknown), *by_id.shape[1:]), np.float32)
    by_id[unknown] = mean + _NOISE * std * noise
    return found


def never_predicted(tokenizer: Tokenizer, size: int) -> str:
    """Returns `config.model.never_predicted` of imported weights: padding, and tokens added to the weights.

    Args:
      tokenizer: tokenizer of the run.
      size: rows of the embedding of the weights.
    """
    external_ids_V = tokenizer.external_ids_V
    lacking = set(np.flatnonzero((external_ids_V < 0) | (external_ids_V >= size))) - {tokenizer.special.eos}
    unused = tokenizer.unused_ids if isinstance(tokenizer, JsonTokenizer) else ()
    return id_ranges.join({*lacking, *unused})


def to_external(params: dict, external_ids_V: np.ndarray) -> dict:
    """Converts parameters from internal to external ids; drops ids that have no external one."""
    internal_O = np.zeros(external_ids_V.max() + 1, np.int64)  # unused external ids get the row of <pad>
    known = np.flatnonzero(external_ids_V >= 0)
    internal_O[external_ids_V[known]] = known
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, axis in VOCABULARY_AXIS.items():
        if path in flat:
            flat[path] = np.take(np.asarray(flat[path]), internal_O, axis)
    return traverse_util.unflatten_dict(flat, sep="/")
