"""Embeddings and output matrix, renumbered between a tokenizer's own ids and ours.

Inside dualsm the ids below 16 are special, whatever the tokenizer (dualsm/data/tokenizer_json.py); its
`external_ids_V` maps our ids to the tokenizer's. Ids that one side lacks are made up or left out.
"""

from __future__ import annotations

import numpy as np

from dualsm.data.tokenizer import RESERVED_IDS
from dualsm.process.errors import UserError

# Logit of ids that the imported weights do not know: as good as never, but training can raise it.
_NEVER = -30.0
_DEVIATION = 0.02  # of the embeddings made up for them


def to_ours(params: dict, external_ids_V: np.ndarray) -> dict:
    """Parameters in the tokenizer's numbering, in ours.

    Args:
      params: with an embedding of as many rows as the weights' vocabulary has.
      external_ids_V: see `Tokenizer`.

    Raises:
      UserError: when the weights lack ids that the tokenizer has pieces of text for.
    """
    embedding_OxD = params["embedding"]["embedding"]
    rows = len(embedding_OxD)
    known_V = (external_ids_V >= 0) & (external_ids_V < rows)
    if external_ids_V[RESERVED_IDS:].max() >= rows:  # special tokens may have been added, but no text
        raise UserError(
            f"the tokenizer has {external_ids_V.max() + 1} ids but the weights are for {rows}; "
            "give the tokenizer that belongs to them"
        )
    own_K = external_ids_V[known_V]
    width = embedding_OxD.shape[1]
    embedding_VxD = (
        np.random.default_rng(0).normal(0, _DEVIATION, (len(external_ids_V), width)).astype(np.float32)
    )
    embedding_VxD[known_V] = embedding_OxD[own_K]
    output = params["head"]["output"]
    kernel_DxV = np.zeros((width, len(external_ids_V)), np.float32)
    kernel_DxV[:, known_V] = output["kernel"][:, own_K]
    bias_V = np.full(len(external_ids_V), _NEVER, np.float32)
    bias_V[known_V] = output["bias"][own_K]
    return _with(params, embedding_VxD, {"kernel": kernel_DxV, "bias": bias_V})


def to_own(params: dict, external_ids_V: np.ndarray) -> dict:
    """Parameters in our numbering, in the tokenizer's; ids that only we have are left out."""
    ours_O = np.zeros(
        external_ids_V.max() + 1, np.int64
    )  # a gap in the tokenizer's ids gets the row of <pad>
    known = np.flatnonzero(external_ids_V >= 0)
    ours_O[external_ids_V[known]] = known
    output = {name: np.asarray(array)[..., ours_O] for name, array in params["head"]["output"].items()}
    return _with(params, np.asarray(params["embedding"]["embedding"])[ours_O], output)


def _with(params: dict, embedding: np.ndarray, output: dict) -> dict:
    return params | {"embedding": {"embedding": embedding}, "head": params["head"] | {"output": output}}
