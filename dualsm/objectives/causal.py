"""Causal language modelling: every token from those before it in its document."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualsm.objectives.example import Example, Row, SpecialIds, document_spans, has_target


def causal(row: Row, key: jax.Array, special: SpecialIds) -> Example:
    """Inputs are the tokens, every target inside a document weighs 1.

    Args:
      row: a packed row.
      key: unused; the objective is deterministic.
      special: unused.
    """
    del key, special
    inputs_L = row.tokens_L1[:-1]
    start_L, _ = document_spans(row.documents_L1[:-1])
    weights_L = has_target(row).astype(jnp.float32)
    return Example(
        inputs_L=inputs_L,
        targets_L=row.tokens_L1[1:],
        weights_L=weights_L,
        counted_L=weights_L,
        key_start_L=start_L,
        key_end_L=jnp.arange(1, inputs_L.shape[0] + 1, dtype=jnp.int32),
    )
