"""Causal language modeling, with all inputs visible or with a fraction of them masked."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualsm.objectives.example import Example, Row, SpecialIds, causal_example, has_target, is_text
from dualsm.objectives.masking import choose, low_above_high, portion
from dualsm.objectives.registry import Option, objective
from dualsm.process.value_rules import FRACTION


@objective(order=0, view="causal", sees="x_0 .. x_i", predicts="x_{i+1}", averages_over="all targets")
def causal(row: Row, key: jax.Array, special: SpecialIds) -> Example:
    """Predicts the next token at every position, with weight 1 for every target inside the document."""
    del key, special
    return causal_example(row, row.tokens_L1[:-1], row.tokens_L1[1:], has_target(row))


@objective(
    order=6,
    view="causal",
    sees="x_0 .. x_i, some masked",
    predicts="x_{i+1}",
    averages_over="all targets",
    low=Option("Smallest masked fraction of a row's text; equal to `high` for a fixed fraction.", FRACTION),
    high=Option("Largest masked fraction.", FRACTION),
    check=low_above_high,
)
def masked_input_causal(
    row: Row, key: jax.Array, special: SpecialIds, low: float = 0.15, high: float = 0.15
) -> Example:
    """Predicts every next token while a fraction of the input text, U(low, high) per row, is `<mask>`.

    Source: MEAP (arXiv 2502.07490), with a fixed fraction of 0.15. MIR (arXiv 2606.06888) trains it with a
    fraction from U(0, 0.5) beside causal modeling of the same row: the pair `mir`.
    """
    fraction_key, round_key, position_key = jax.random.split(key, 3)
    inputs_L = row.tokens_L1[:-1]
    maskable_L = is_text(inputs_L) & (row.documents_L1[:-1] >= 0)
    fraction = low + (high - low) * row.uniform(fraction_key)
    k = portion(fraction, maskable_L.sum(), jax.random.uniform(round_key))
    masked_L = choose(position_key, maskable_L, k)
    inputs_L = jnp.where(masked_L, special.mask, inputs_L)
    return causal_example(row, inputs_L, row.tokens_L1[1:], has_target(row))
