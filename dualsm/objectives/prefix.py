"""Prefix language modelling: a bidirectional prefix, the rest of the document predicted causally."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualsm.objectives.example import Example, Row, SpecialIds, document_spans, has_target


def prefix(row: Row, key: jax.Array, special: SpecialIds) -> Example:
    """Each document gets a prefix of a length drawn uniformly from 1..n-1, n being its tokens in the row.

    The prefix is visible from everywhere in the document; targets after it weigh 1, those inside it 0.

    Args:
      row: a packed row.
      key: draws the lengths, one a document.
      special: unused.
    """
    del special
    length = row.tokens_L1.shape[0] - 1
    positions_L = jnp.arange(length, dtype=jnp.int32)
    start_L1, end_L1 = document_spans(row.documents_L1)
    start_L, tokens_L = start_L1[:-1], (end_L1 - start_L1)[:-1]
    # One draw a document: the one at its first position.
    uniform_L = jax.random.uniform(key, (length,))[start_L]
    drawn_L = 1 + jnp.floor(uniform_L * (tokens_L - 1)).astype(jnp.int32)
    prefix_end_L = start_L + jnp.clip(drawn_L, 1, jnp.maximum(tokens_L - 1, 1))
    weights_L = (has_target(row) & (positions_L + 1 >= prefix_end_L)).astype(jnp.float32)
    return Example(
        inputs_L=row.tokens_L1[:-1],
        targets_L=row.tokens_L1[1:],
        weights_L=weights_L,
        loss_denominator_L=weights_L,
        key_start_L=start_L,
        key_end_L=jnp.maximum(positions_L + 1, prefix_end_L),
    )
