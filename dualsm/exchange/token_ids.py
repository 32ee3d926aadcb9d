"""Renumbering of token ids in the embedding and the output layer.

dualsm reserves its first ids for special tokens, for every tokenizer (dualsm/data/tokenizer_json.py). The
`external_ids_V` of a tokenizer map these internal ids to the external ids of its file; -1 means none.
"""

from __future__ import annotations

import numpy as np

from dualsm.data.tokenizer import RESERVED_IDS
from dualsm.process.errors import UserError

# Output bias of ids that imported weights lack: practically never generated, but training can raise it.
_NEVER = -30.0
_EMBEDDING_STD = 0.02  # of random embeddings for such ids


def to_internal(params: dict, external_ids_V: np.ndarray) -> dict:
    """Converts parameters from external to internal ids.

    Args:
      params: parameters; the rows of the embedding are external ids.
      external_ids_V: see `Tokenizer`.

    Raises:
      UserError: if the tokenizer has pieces of text whose ids the weights lack.
    """
    embedding_OxD = params["embedding"]["embedding"]
    size = len(embedding_OxD)
    known_V = (external_ids_V >= 0) & (external_ids_V < size)
    if external_ids_V[RESERVED_IDS:].max() >= size:  # the weights may lack special tokens, but no text
        raise UserError(
            f"the tokenizer has {external_ids_V.max() + 1} ids but the weights have {size}; "
            "give the tokenizer that belongs to the weights"
        )
    ids_K = external_ids_V[known_V]
    vocab_size, d_model = len(external_ids_V), embedding_OxD.shape[1]
    embedding_VxD = np.random.default_rng(0).normal(0, _EMBEDDING_STD, (vocab_size, d_model))
    embedding_VxD = embedding_VxD.astype(np.float32)
    embedding_VxD[known_V] = embedding_OxD[ids_K]
    output = params["head"]["output"]
    kernel_DxV = np.zeros((d_model, vocab_size), np.float32)
    kernel_DxV[:, known_V] = output["kernel"][:, ids_K]
    bias_V = np.full(vocab_size, _NEVER, np.float32)
    bias_V[known_V] = output["bias"][ids_K]
    return _replace(params, embedding_VxD, {"kernel": kernel_DxV, "bias": bias_V})


def to_external(params: dict, external_ids_V: np.ndarray) -> dict:
    """Converts parameters from internal to external ids; drops ids that have no external one."""
    internal_O = np.zeros(external_ids_V.max() + 1, np.int64)  # unused external ids get the row of <pad>
    known = np.flatnonzero(external_ids_V >= 0)
    internal_O[external_ids_V[known]] = known
    output = {name: np.asarray(array)[..., internal_O] for name, array in params["head"]["output"].items()}
    return _replace(params, np.asarray(params["embedding"]["embedding"])[internal_O], output)


def _replace(params: dict, embedding: np.ndarray, output: dict) -> dict:
    return params | {"embedding": {"embedding": embedding}, "head": params["head"] | {"output": output}}
