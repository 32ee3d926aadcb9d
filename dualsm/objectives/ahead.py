"""Causal objectives whose targets are not the next token but tokens further ahead in the document.

A mode token that replaces the first token of each document tells the model which target it must predict.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualsm.objectives.example import (
    Example,
    Row,
    SpecialIds,
    below,
    causal_example,
    document_spans,
    has_target,
    with_mode,
)
from dualsm.objectives.registry import Option, objective
from dualsm.process.value_rules import between

REST = 9
AHEAD_2 = 10  # the mode tokens of larger distances have the ids that follow
MAX_DISTANCE = 7


@objective(
    order=5,
    view="causal",
    sees="x_0 .. x_i",
    predicts="x_{i+d}, d drawn for each row",
    averages_over="targets inside the document",
    mode_tokens={f"ahead{d}": AHEAD_2 + d - 2 for d in range(2, MAX_DISTANCE + 1)},
    distance=Option("Largest distance of a target, in tokens.", between(1, MAX_DISTANCE), defines_task=True),
)
def diverse_causal(row: Row, key: jax.Array, special: SpecialIds, distance: int = 4) -> Example:
    """Predicts x_{i+d} at position i, with one distance d per row, drawn from 1..distance.

    Each distance above 1 has a mode token. A row with d = 1 is bit-identical to a row of `causal`. This is a
    reconstruction of the diversity-enhanced autoregressive objective of "Look Ahead or Look Around?"
    (arXiv 2407.00935), in which the distance of the target varies; the mode tokens are our choice.
    """
    inputs_L = row.tokens_L1[:-1]
    d = 1 + below(row.uniform(key), distance)
    target_L = jnp.arange(inputs_L.shape[0]) + d
    last = inputs_L.shape[0]
    # Targets beyond the row have weight 0 and are clipped to the last token.
    clipped_L = jnp.minimum(target_L, last)
    same_L = row.documents_L1[clipped_L] == row.documents_L1[:-1]
    weights_L = same_L & (target_L <= last) & (row.documents_L1[:-1] >= 0)
    moved_L = with_mode(row, inputs_L, AHEAD_2 + d - 2)
    return causal_example(row, jnp.where(d == 1, inputs_L, moved_L), row.tokens_L1[clipped_L], weights_L)


@objective(
    order=8,
    view="causal",
    sees="x_0 .. x_i",
    predicts="one of x_{i+1} .. x_n, drawn at random",
    averages_over="all positions",
    mode_tokens={"rest": REST},
)
def next_all(row: Row, key: jax.Array, special: SpecialIds) -> Example:
    """Predicts at position i a token drawn uniformly from the rest of its document, x_{i+1}..x_n.

    The loss at each position is an unbiased estimate of the mean over all these tokens: next-all-token
    prediction as in TokenUnify (arXiv 2405.16847).
    """
    inputs_L = row.tokens_L1[:-1]
    positions_L = jnp.arange(inputs_L.shape[0], dtype=jnp.int32)
    _, end_L1 = document_spans(row.documents_L1)
    remaining_L = jnp.maximum(end_L1[:-1] - positions_L - 1, 1)
    target_L = positions_L + 1 + below(jax.random.uniform(key, inputs_L.shape), remaining_L)
    return causal_example(row, with_mode(row, inputs_L, REST), row.tokens_L1[target_L], has_target(row))
