"""Shifted masked language modelling, unweighted: the mean over the masked tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualsm.data.tokenizer import RESERVED_IDS
from dualsm.objectives.example import Example, Row, SpecialIds, document_spans, has_target, is_text
from dualsm.objectives.masking import choose, hide, lowest, portion


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
    """Masks whole spans until the share is reached, and replaces them as BERT does.

    The text is tiled with spans of 1..span tokens; whole spans, the last one cut, are chosen at random.
    Each is replaced as one: by `<mask>`, by random tokens, or not at all.

    Source: GPT-BERT (arXiv 2410.24159) and its released code: spans of 1..3, the share going linearly from
    0.30 at the start of training to 0.15 at its end, 80/10/10 replacement.

    Args:
      row: a packed row; its progress sets the share, its stratified draw rounds the number of tokens.
      key: draws spans, places and replacements.
      special: its `mask` and `vocab_size`.
      first, last: share of the targets masked at the start and at the end of training.
      span: the longest span, tokens.
      random: share of the spans replaced by random tokens of text.
      keep: share of the spans left as they are, but predicted.

    Raises:
      ValueError: when random tokens are asked for and the vocabulary is unknown.
    """
    if random and special.vocab_size <= RESERVED_IDS:
        raise ValueError("masked draws random tokens and needs special.vocab_size, the number of ids")
    count_key, span_key, place_key, kind_key, token_key = jax.random.split(key, 5)
    maskable_L = has_target(row) & is_text(row.tokens_L1[1:])
    length = maskable_L.shape
    share = first + (last - first) * row.progress
    k = portion(share, maskable_L.sum(), row.uniform(count_key))

    span_L = tile(span_key, row.documents_L1[1:], span)
    masked_L = lowest(jax.random.uniform(place_key, length)[span_L], maskable_L, k)
    kind_L = jax.random.uniform(kind_key, length)[span_L]
    replacement_L = jnp.full(length, special.mask, jnp.int32)
    if random:
        random_L = jax.random.randint(token_key, length, RESERVED_IDS, special.vocab_size)
        replacement_L = jnp.where(kind_L < random, random_L, replacement_L)
    # Positions so far are those that predict; a replacement goes one further, as does what is hidden.
    inputs_L = hide(row.tokens_L1[:-1], masked_L & (kind_L < 1 - keep), jnp.roll(replacement_L, 1))
    return _example(row, inputs_L, masked_L)


def tile(key: jax.Array, documents_L: jax.Array, longest: int) -> jax.Array:
    """Tiles a row with spans of random lengths 1..longest, cut at the borders of documents.

    Returns:
      int32 [L]; the first position of the span at each position.
    """
    positions_L = jnp.arange(documents_L.shape[0], dtype=jnp.int32)
    lengths_L = jax.random.randint(key, documents_L.shape, 1, longest + 1)
    begins_L = jnp.zeros(documents_L.shape, bool).at[jnp.cumsum(lengths_L)].set(True, mode="drop")
    start_L, _ = document_spans(documents_L)
    return jax.lax.cummax(jnp.where(begins_L | (positions_L == start_L), positions_L, 0))


def variable_length_masked(
    row: Row, key: jax.Array, special: SpecialIds, low: float = 0.05, high: float = 0.95
) -> Example:
    """Masks a share of the tokens that is drawn anew for each row, U(low, high).

    A reconstruction of the variable-length masked objective of "Look Ahead or Look Around?"
    (arXiv 2407.00935). It differs from `masked_diffusion` by its weights: a row with few masked tokens
    counts for few.

    Args:
      row: a packed row; its stratified draw is the share.
      key: draws the share and the places.
      special: its `mask` replaces masked tokens.
      low, high: range of the share.
    """
    share_key, round_key, place_key = jax.random.split(key, 3)
    maskable_L = has_target(row) & is_text(row.tokens_L1[1:])
    share = low + (high - low) * row.uniform(share_key)
    k = portion(share, maskable_L.sum(), jax.random.uniform(round_key))
    masked_L = choose(place_key, maskable_L, k)
    return _example(row, hide(row.tokens_L1[:-1], masked_L, special.mask), masked_L)


def _example(row: Row, inputs_L: jax.Array, masked_L: jax.Array) -> Example:
    """All of the document is seen; every masked token weighs 1 and counts 1."""
    start_L, end_L = document_spans(row.documents_L1[:-1])
    weights_L = masked_L.astype(jnp.float32)
    return Example(inputs_L, row.tokens_L1[1:], weights_L, weights_L, start_L, end_L)
