"""What every objective takes and what it makes: a packed `Row` becomes an `Example`.

The shift is made here and nowhere else: position i predicts token i + 1. The objectives that differ on
purpose say so in their name or option: `diverse_causal`, `next_all` and `masked_diffusion` with
`shifted=False`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dualsm.data.tokenizer import RESERVED_IDS, SpecialIds


class Row(NamedTuple):
    """One packed row, or a batch of them with a leading axis on every field.

    Attributes:
      tokens_L1: int32 [L+1]; x_0..x_L.
      documents_L1: int32 [L+1]; equal for tokens of one document, negative where there is no text.
      stratum: int32 []; this row's number among the rows of its objective in the batch.
      strata: int32 []; how many those are. An objective that draws one number a row draws it from the
        part [stratum/strata, (stratum+1)/strata) of its distribution, so that a batch covers all of it
        (low-discrepancy sampling, as in MDLM, arXiv 2406.07524).
      progress: float32 []; share of the training that is done, for schedules of an objective.
    """

    tokens_L1: jax.Array
    documents_L1: jax.Array
    stratum: jax.Array
    strata: jax.Array
    progress: jax.Array

    def uniform(self, key: jax.Array) -> jax.Array:
        """The row's one stratified draw from U[0, 1)."""
        return (self.stratum + jax.random.uniform(key)) / self.strata


def single_row(tokens_L1: jax.Array, documents_L1: jax.Array) -> Row:
    """A row on its own: the whole of every distribution, at the start of training."""
    return Row(jnp.asarray(tokens_L1), jnp.asarray(documents_L1), jnp.int32(0), jnp.int32(1), jnp.float32(0))


class Example(NamedTuple):
    """All that the model and the loss need to know, whatever the objective.

    Attributes:
      inputs_L: int32 [L]; tokens the model sees.
      targets_L: int32 [L]; position i is to predict targets[i].
      weights_L: float32 [L]; weight of each position's loss; 0 where it carries none.
      loss_denominator_L: float32 [L]; each position's addend to the denominator. The loss of a set of rows is
        sum(weights * nll) / sum(loss_denominator), divided once.
      key_start_L, key_end_L: int32 [L]; position i attends to keys [key_start[i], key_end[i]).
    """

    inputs_L: jax.Array
    targets_L: jax.Array
    weights_L: jax.Array
    loss_denominator_L: jax.Array
    key_start_L: jax.Array
    key_end_L: jax.Array


def document_spans(documents_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First position and one past the last of the document at each position, int32 [L] each."""
    positions_L = jnp.arange(documents_L.shape[0], dtype=jnp.int32)
    changes_L = documents_L[1:] != documents_L[:-1]
    border = jnp.ones(1, bool)
    first_L = jnp.concatenate([border, changes_L])
    last_L = jnp.concatenate([changes_L, border])
    start_L = jax.lax.cummax(jnp.where(first_L, positions_L, 0))
    end_L = jax.lax.cummin(jnp.where(last_L, positions_L + 1, documents_L.shape[0]), reverse=True)
    return start_L, end_L


def causal_example(row: Row, inputs_L: jax.Array, targets_L: jax.Array, weights_L: jax.Array) -> Example:
    """An example in which every position sees its document up to itself."""
    start_L, _ = document_spans(row.documents_L1[:-1])
    end_L = jnp.arange(1, inputs_L.shape[0] + 1, dtype=jnp.int32)
    weights_L = weights_L.astype(jnp.float32)
    return Example(inputs_L, targets_L, weights_L, weights_L, start_L, end_L)


def with_mode(row: Row, inputs_L: jax.Array, token: jax.Array | int) -> jax.Array:
    """The inputs with a mode token in the place of each document's first one, int32 [L].

    No target is lost, because the first token of a document within a row is never one. For a document
    that begins in the row it is `<s>`; for one that goes on from the row before it is a token of text,
    which the row then does not see.
    """
    start_L, _ = document_spans(row.documents_L1[:-1])
    first_L = (jnp.arange(start_L.shape[0]) == start_L) & (row.documents_L1[:-1] >= 0)
    return jnp.where(first_L, token, inputs_L)


def below(uniform: jax.Array, n: jax.Array | int) -> jax.Array:
    """An integer in 0..n-1, int32, from a draw from U[0, 1), which rounding may have made 1."""
    return jnp.minimum(jnp.floor(uniform * n).astype(jnp.int32), n - 1)


def has_target(row: Row) -> jax.Array:
    """Whether position i and token i + 1 lie in one document, bool [L]."""
    return (row.documents_L1[1:] == row.documents_L1[:-1]) & (row.documents_L1[1:] >= 0)


def is_text(tokens_L: jax.Array) -> jax.Array:
    """Whether a token stands for text; special ids may not be masked."""
    return tokens_L >= RESERVED_IDS


__all__ = [
    "Example", "Row", "SpecialIds", "below", "causal_example", "document_spans", "has_target", "is_text",
    "single_row", "with_mode",
]  # fmt: skip
