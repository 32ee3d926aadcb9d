"""The input of every objective, a packed `Row`, and its output, an `Example`.

Position i predicts token i + 1. Objectives apply this shift, so that the model and the loss never shift.
Exceptions are `diverse_causal`, `next_all`, and `masked_diffusion` with `shifted=False`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dualsm.data.tokenizer import RESERVED_IDS, SpecialIds


class Row(NamedTuple):
    """A packed sequence, or a batch of packed sequences with a leading axis on every field.

    Attributes:
      tokens_L1: int32 [L+1]; x_0..x_L.
      documents_L1: int32 [L+1]; equal for tokens of one document, negative for padding.
      stratum: int32 []; index of the row among the rows of its objective in the batch.
      strata: int32 []; number of rows of its objective in the batch. An objective that draws one number per
        row draws it from the part [stratum/strata, (stratum+1)/strata) of its distribution, so that a batch
        covers the whole distribution (low-discrepancy sampling, as in MDLM, arXiv 2406.07524).
      progress: float32 []; completed fraction of the training steps, for schedules inside an objective.
    """

    tokens_L1: jax.Array
    documents_L1: jax.Array
    stratum: jax.Array
    strata: jax.Array
    progress: jax.Array

    def uniform(self, key: jax.Array) -> jax.Array:
        """Returns a stratified draw from U[0, 1); an objective uses at most one per row."""
        return (self.stratum + jax.random.uniform(key)) / self.strata


def single_row(tokens_L1: jax.Array, documents_L1: jax.Array) -> Row:
    """Returns a row that is the only one of its batch, at the start of training."""
    return Row(jnp.asarray(tokens_L1), jnp.asarray(documents_L1), jnp.int32(0), jnp.int32(1), jnp.float32(0))


class Example(NamedTuple):
    """The inputs of the model and of the loss, for every objective.

    Attributes:
      inputs_L: int32 [L]; input tokens.
      targets_L: int32 [L]; position i predicts targets[i].
      weights_L: float32 [L]; loss weight of each position; 0 for positions without loss.
      loss_denominator_L: float32 [L]; contribution of each position to the denominator of the loss. The loss
        of a batch is sum(weights * nll) / sum(loss_denominator) over all its rows.
      key_start_L, key_end_L: int32 [L]; position i attends to keys [key_start[i], key_end[i]).
    """

    inputs_L: jax.Array
    targets_L: jax.Array
    weights_L: jax.Array
    loss_denominator_L: jax.Array
    key_start_L: jax.Array
    key_end_L: jax.Array


def document_spans(documents_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the start and the exclusive end of the document at each position, int32 [L] each."""
    positions_L = jnp.arange(documents_L.shape[0], dtype=jnp.int32)
    changes_L = documents_L[1:] != documents_L[:-1]
    border = jnp.ones(1, bool)
    first_L = jnp.concatenate([border, changes_L])
    last_L = jnp.concatenate([changes_L, border])
    start_L = jax.lax.cummax(jnp.where(first_L, positions_L, 0))
    end_L = jax.lax.cummin(jnp.where(last_L, positions_L + 1, documents_L.shape[0]), reverse=True)
    return start_L, end_L


def count(flags_L: jax.Array, start_L: jax.Array) -> jax.Array:
    """Returns the number of True flags in the document up to and including each position, int32 [L]."""
    total_L = jnp.cumsum(flags_L, dtype=jnp.int32)
    return total_L - (total_L - flags_L)[start_L]


def causal_example(row: Row, inputs_L: jax.Array, targets_L: jax.Array, weights_L: jax.Array) -> Example:
    """Returns an example in which every position attends to its document up to itself."""
    start_L, _ = document_spans(row.documents_L1[:-1])
    end_L = jnp.arange(1, inputs_L.shape[0] + 1, dtype=jnp.int32)
    weights_L = weights_L.astype(jnp.float32)
    return Example(inputs_L, targets_L, weights_L, weights_L, start_L, end_L)


def with_mode(row: Row, inputs_L: jax.Array, token: jax.Array | int) -> jax.Array:
    """Returns the inputs with a mode token in place of each document's first token, int32 [L].

    No target is lost, because the first token of a document in a row is never a target. It is `<s>` for a
    document that begins in the row, and a text token for a document that continues from the previous row; the
    model then does not see that token.
    """
    start_L, _ = document_spans(row.documents_L1[:-1])
    first_L = (jnp.arange(start_L.shape[0]) == start_L) & (row.documents_L1[:-1] >= 0)
    return jnp.where(first_L, token, inputs_L)


def below(uniform: jax.Array, n: jax.Array | int) -> jax.Array:
    """Maps a draw from U[0, 1) to an integer in 0..n-1, int32; a draw that was rounded to 1 maps to n-1."""
    return jnp.minimum(jnp.floor(uniform * n).astype(jnp.int32), n - 1)


def has_target(row: Row) -> jax.Array:
    """Returns True at positions i for which token i + 1 belongs to the same document, bool [L]."""
    return (row.documents_L1[1:] == row.documents_L1[:-1]) & (row.documents_L1[1:] >= 0)


def is_text(tokens_L: jax.Array) -> jax.Array:
    """Returns True for tokens of text; special ids are never masked."""
    return tokens_L >= RESERVED_IDS


__all__ = [
    "Example", "Row", "SpecialIds", "below", "causal_example", "count", "document_spans", "has_target",
    "is_text", "single_row", "with_mode",
]  # fmt: skip
