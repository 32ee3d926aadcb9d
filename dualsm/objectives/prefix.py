"""Prefix language modeling: bidirectional attention to a prefix, causal prediction after it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualsm.objectives.example import Example, Row, SpecialIds, document_spans, has_target
from dualsm.objectives.registry import objective


@objective(
    order=1,
    view="prefix",
    sees="prefix, and x_0 .. x_i",
    predicts="x_{i+1}, after the prefix",
    averages_over="targets after the prefix",
)
def prefix(row: Row, key: jax.Array, special: SpecialIds) -> Example:
    """Predicts the tokens after a prefix, with a length drawn uniformly from 1..n-1 per document.

    n is the number of the document's tokens in the row. All positions of the document attend to the
    prefix. Targets after the prefix have weight 1, targets inside it weight 0.
    """
    del special
    positions_L = jnp.arange(row.tokens_L1.shape[0] - 1, dtype=jnp.int32)
    start_L, _ = document_spans(row.documents_L1[:-1])
    prefix_end_L = draw_prefix_end(row, key)
    weights_L = (has_target(row) & (positions_L + 1 >= prefix_end_L)).astype(jnp.float32)
    return Example(
        inputs_L=row.tokens_L1[:-1],
        targets_L=row.tokens_L1[1:],
        weights_L=weights_L,
        loss_denominator_L=weights_L,
        key_start_L=start_L,
        key_end_L=jnp.maximum(positions_L + 1, prefix_end_L),
    )


def draw_prefix_end(row: Row, key: jax.Array) -> jax.Array:
    """Returns the end of each document's prefix, which has 1..n-1 of its n tokens, int32 [L]."""
    start_L1, end_L1 = document_spans(row.documents_L1)
    start_L, tokens_L = start_L1[:-1], (end_L1 - start_L1)[:-1]
    # One draw per document: the draw at its first position.
    uniform_L = jax.random.uniform(key, start_L.shape)[start_L]
    drawn_L = 1 + jnp.floor(uniform_L * (tokens_L - 1)).astype(jnp.int32)
    return start_L + jnp.clip(drawn_L, 1, jnp.maximum(tokens_L - 1, 1))
