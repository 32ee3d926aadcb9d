"""Shifted masked language modeling; the loss is the unweighted mean over the masked tokens."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dualsm.data.tokenizer import RESERVED_IDS
from dualsm.objectives.example import Example, Row, SpecialIds, document_spans, has_target, is_text
from dualsm.objectives.masking import choose, hide, low_above_high, lowest, portion
from dualsm.objectives.registry import Option, objective
from dualsm.process.value_rules import FRACTION, at_least


def _replaced_too_often(options: Mapping) -> str:
    random, keep = options["random"], options["keep"]
    return f"random={random} and keep={keep} must not exceed 1 together" if random + keep > 1 else ""


@objective(
    order=3,
    view="document",
    sees="the document, spans masked",
    predicts="x_{i+1} where it is masked",
    averages_over="masked tokens",
    first=Option("Masked fraction of the targets at the start of training.", FRACTION),
    last=Option("Masked fraction at the end of training; linear in between.", FRACTION),
    span=Option("Longest span, in tokens.", at_least(1)),
    random=Option("Fraction of the spans that random text tokens replace.", FRACTION),
    keep=Option("Fraction of the spans that stay unchanged but are predicted.", FRACTION),
    check=_replaced_too_often,
)
def masked(
    row: Row,
    key: jax.Array,
    special: SpecialIds,
    first: float = 0.30,
    last: float = 0.15,
    span: int = 3,
    random: float = 0.1,
    keep: float = 0.1,
) -> Example:
    """Masks random spans until a fraction of the targets is masked, and replaces them as BERT does.

    Spans of 1..span tokens tile the text. Spans are masked in random order; the last one is cut. A masked
    span is replaced as a whole by `<mask>` or by random tokens, or it stays unchanged.

    Source: GPT-BERT (arXiv 2410.24159) and its released code: spans of 1..3 tokens, a fraction that falls
    linearly from 0.30 to 0.15 during training, 80/10/10 replacement.

    Raises:
      ValueError: if `random` is positive and `special.vocab_size` is unknown.
    """
    if random and special.vocab_size <= RESERVED_IDS:
        raise ValueError(f"special.vocab_size={special.vocab_size}: set it, random replacement needs it")
    count_key, span_key, order_key, kind_key, token_key = jax.random.split(key, 5)
    maskable_L = has_target(row) & is_text(row.tokens_L1[1:])
    length = maskable_L.shape
    fraction = first + (last - first) * row.progress
    k = portion(fraction, maskable_L.sum(), row.uniform(count_key))

    span_L = tile(span_key, row.documents_L1[1:], span)
    masked_L = lowest(jax.random.uniform(order_key, length)[span_L], maskable_L, k)
    kind_L = jax.random.uniform(kind_key, length)[span_L]
    replacement_L = jnp.full(length, special.mask, jnp.int32)
    if random:
        random_L = jax.random.randint(token_key, length, RESERVED_IDS, special.vocab_size)
        replacement_L = jnp.where(kind_L < random, random_L, replacement_L)
    # All arrays so far are indexed by the predicting position; its target is one position later.
    inputs_L = hide(row.tokens_L1[:-1], masked_L & (kind_L < 1 - keep), jnp.roll(replacement_L, 1))
    return _example(row, inputs_L, masked_L)


def tile(key: jax.Array, documents_L: jax.Array, longest: int) -> jax.Array:
    """Tiles a row with spans of random lengths 1..longest, cut at document boundaries.

    Returns:
      int32 [L]; the first position of the span at each position.
    """
    positions_L = jnp.arange(documents_L.shape[0], dtype=jnp.int32)
    lengths_L = jax.random.randint(key, documents_L.shape, 1, longest + 1)
    begins_L = jnp.zeros(documents_L.shape, bool).at[jnp.cumsum(lengths_L)].set(True, mode="drop")
    start_L, _ = document_spans(documents_L)
    return jax.lax.cummax(jnp.where(begins_L | (positions_L == start_L), positions_L, 0))


@objective(
    order=4,
    view="document",
    sees="the document, masked",
    predicts="x_{i+1} where it is masked",
    averages_over="masked tokens",
    low=Option("Smallest masked fraction of a row's targets.", FRACTION),
    high=Option("Largest masked fraction.", FRACTION),
    check=low_above_high,
)
def variable_length_masked(
    row: Row, key: jax.Array, special: SpecialIds, low: float = 0.05, high: float = 0.95
) -> Example:
    """Masks a fraction of the targets that is drawn from U(low, high) for each row.

    This is a reconstruction of the variable-length masked objective of "Look Ahead or Look Around?"
    (arXiv 2407.00935). Unlike in `masked_diffusion`, every masked token has weight 1, so that rows with few
    masked tokens contribute less.
    """
    fraction_key, round_key, position_key = jax.random.split(key, 3)
    maskable_L = has_target(row) & is_text(row.tokens_L1[1:])
    fraction = low + (high - low) * row.uniform(fraction_key)
    k = portion(fraction, maskable_L.sum(), jax.random.uniform(round_key))
    masked_L = choose(position_key, maskable_L, k)
    return _example(row, hide(row.tokens_L1[:-1], masked_L, special.mask), masked_L)


def _example(row: Row, inputs_L: jax.Array, masked_L: jax.Array) -> Example:
    """Returns an example with bidirectional attention and weight 1 for every masked token."""
    start_L, end_L = document_spans(row.documents_L1[:-1])
    weights_L = masked_L.astype(jnp.float32)
    return Example(inputs_L, row.tokens_L1[1:], weights_L, weights_L, start_L, end_L)
