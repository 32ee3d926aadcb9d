"""UL2's mixture of denoisers in a decoder: the corrupted text is a prefix, followed by the missing spans.

Source: UL2 (arXiv 2205.05131) for the table of denoisers. The decoder layout, with one sentinel for all
spans, is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dualsm.objectives.example import (
    Example,
    Row,
    SpecialIds,
    below,
    count,
    document_spans,
    has_target,
    is_text,
    with_mode,
)
from dualsm.objectives.masking import portion
from dualsm.objectives.prefix import prefix
from dualsm.objectives.registry import Option, objective
from dualsm.process.value_rules import Rule

HOLE = 5  # sentinel: replaces a missing span, and precedes the span itself
REGULAR, SEQUENTIAL, EXTREME = 6, 7, 8  # mode tokens
MODES = {"R": REGULAR, "S": SEQUENTIAL, "X": EXTREME}


class Denoiser(NamedTuple):
    """A corruption of a row: mode R, S or X, mean span length in tokens, and missing fraction of the text."""

    mode: str
    span: float
    fraction: float


DENOISERS = (
    Denoiser("R", 3, 0.15),
    Denoiser("R", 8, 0.15),
    Denoiser("S", 1, 0.0),  # a prefix, no holes
    Denoiser("X", 3, 0.5),
    Denoiser("X", 8, 0.5),
    Denoiser("X", 64, 0.15),
    Denoiser("X", 64, 0.5),
)


@objective(
    order=7,
    view="prefix",
    sees="text with holes, and the missing spans so far",
    predicts="the next token of a missing span",
    averages_over="tokens of missing spans",
    mode_tokens={"hole": HOLE, "regular": REGULAR, "sequential": SEQUENTIAL, "extreme": EXTREME},
    modes=Option(
        "Letters of the denoisers to draw from, all with equal probability.",
        Rule(lambda v: v and set(v) <= set(MODES) and len(set(v)) == len(v), "be different letters of RSX"),
        defines_task=True,
    ),
)
def span_denoising(row: Row, key: jax.Array, special: SpecialIds, modes: str = "RSX") -> Example:
    """Applies one of UL2's denoisers, drawn per row. A document x_0 .. x_n becomes, at the same positions,

        R, X:  MODE  text with <hole> in place of each span  |  <hole> span  <hole> span  ...
        S:     MODE  prefix  |  rest of the text

    Attention is bidirectional before the bar and causal after it. The tokens of the missing spans (S: the
    tokens after the prefix) have weight 1, the sentinels 0. Each span adds two sentinels, so the end of the
    document is cut until the result fits; unused positions at the end are `<pad>`, which no other position
    attends to.
    """
    choice_key, span_key, prefix_key = jax.random.split(key, 3)
    table = [denoiser for denoiser in DENOISERS if denoiser.mode in modes]
    chosen = below(row.uniform(choice_key), len(table))
    mode = jnp.array([MODES[denoiser.mode] for denoiser in table])[chosen]
    span = jnp.array([denoiser.span for denoiser in table], jnp.float32)[chosen]
    fraction = jnp.array([denoiser.fraction for denoiser in table], jnp.float32)[chosen]

    missing_L1 = draw_spans(span_key, row.documents_L1, span, fraction) & is_text(row.tokens_L1)
    example = jax.tree.map(
        lambda prefixed, spans: jnp.where(mode == SEQUENTIAL, prefixed, spans),
        prefix(row, prefix_key, special),
        spans_last(row, missing_L1, special),
    )
    return example._replace(inputs_L=with_mode(row, example.inputs_L, mode))


def draw_spans(key: jax.Array, documents_L1: jax.Array, span: jax.Array, fraction: jax.Array) -> jax.Array:
    """Draws the missing spans of each document as T5 does: r tokens in h spans, all divisions equally likely.

    Of the n tokens after a document's first, r = fraction * n are missing, in h = r / span spans (at least
    one); both numbers are rounded stochastically. The r tokens are divided into h spans, which are inserted
    into h of the n - r + 1 gaps between and around the other tokens.

    Args:
      key: PRNG key.
      documents_L1: see `Row`.
      span: float32 []; mean length of a span, in tokens.
      fraction: float32 []; missing fraction of the tokens.

    Returns:
      bool [L+1]; True for missing tokens, False at the first token of each document and at padding.
    """
    round_key, part_key, gap_key = jax.random.split(key, 3)
    start_L1, end_L1 = document_spans(documents_L1)
    size = documents_L1.shape[0]
    number_L1 = jnp.arange(size, dtype=jnp.int32) - start_L1
    n_L1 = jnp.where(documents_L1 >= 0, end_L1 - start_L1 - 1, 0)
    rounding_2xL1 = jax.random.uniform(round_key, (2, size))[:, start_L1]
    r_L1 = portion(fraction, n_L1, rounding_2xL1[0])
    h_L1 = jnp.floor(r_L1 / span + rounding_2xL1[1]).astype(jnp.int32)
    h_L1 = jnp.minimum(jnp.maximum(h_L1, 1), jnp.minimum(r_L1, n_L1 - r_L1 + 1))

    # A position is used both as the number 0..r-1 of a missing token and as the number 0..n-r of a gap.
    among_L1 = (number_L1 >= 1) & (number_L1 < r_L1)
    part_L1 = count(_first(part_key, start_L1, among_L1, h_L1 - 1), start_L1)
    chosen_L1 = _first(gap_key, start_L1, number_L1 <= n_L1 - r_L1, h_L1)
    nth_L1 = start_L1 + count(chosen_L1, start_L1) - 1
    gap_L1 = jnp.zeros(size, jnp.int32).at[jnp.where(chosen_L1, nth_L1, size)].set(number_L1, mode="drop")
    place_L1 = start_L1 + 1 + number_L1 + gap_L1[start_L1 + part_L1]
    missing_L1 = jnp.zeros(size, bool)
    return missing_L1.at[jnp.where(number_L1 < r_L1, place_L1, size)].set(True, mode="drop")


def spans_last(row: Row, missing_L1: jax.Array, special: SpecialIds) -> Example:
    """Moves the missing spans of each document after its other tokens, with sentinels.

    Args:
      row: a packed row.
      missing_L1: bool [L+1]; False at the first token of each document.
      special: special ids of the tokenizer.

    Returns:
      An `Example` in the layout of `span_denoising`, without mode tokens.
    """
    start_L1, end_L1 = document_spans(row.documents_L1)
    size = start_L1.shape[0]
    number_L1 = jnp.arange(size, dtype=jnp.int32) - start_L1
    opens_L1 = missing_L1 & ~jnp.roll(missing_L1, 1)
    holes_L1 = count(opens_L1, start_L1)
    # Up to this token the document needs number + 1 positions, and two more per span.
    fits_L1 = (number_L1 + 1 + 2 * holes_L1 <= end_L1 - start_L1) & (row.documents_L1 >= 0)
    opens_L1, missing_L1 = opens_L1 & fits_L1, missing_L1 & fits_L1
    shown_L1 = fits_L1 & ~missing_L1
    shown_so_far_L1, missing_so_far_L1 = count(shown_L1, start_L1), count(missing_L1, start_L1)
    opened_L1 = count(opens_L1, start_L1)
    bar_L1 = start_L1 + (shown_so_far_L1 + opened_L1)[end_L1 - 1]  # index of the first missing span

    front_L1 = start_L1 + shown_so_far_L1 + holes_L1 - 1
    back_L1 = bar_L1 + missing_so_far_L1 + holes_L1 - 1

    def put(array_L1: jax.Array, which_L1: jax.Array, where_L1: jax.Array, value: jax.Array | int):
        return array_L1.at[jnp.where(which_L1, where_L1, size)].set(value, mode="drop")

    tokens_L1 = jnp.full(size, special.pad, jnp.int32)
    tokens_L1 = put(tokens_L1, shown_L1, front_L1, row.tokens_L1)
    tokens_L1 = put(tokens_L1, opens_L1, front_L1, HOLE)
    tokens_L1 = put(tokens_L1, opens_L1, back_L1 - 1, HOLE)
    tokens_L1 = put(tokens_L1, missing_L1, back_L1, row.tokens_L1)
    scored_L1 = put(jnp.zeros(size, bool), missing_L1, back_L1, True)

    weights_L = (scored_L1[1:] & has_target(row)).astype(jnp.float32)
    positions_L = jnp.arange(size - 1, dtype=jnp.int32)
    return Example(
        inputs_L=tokens_L1[:-1],
        targets_L=tokens_L1[1:],
        weights_L=weights_L,
        loss_denominator_L=weights_L,
        key_start_L=start_L1[:-1],
        key_end_L=jnp.maximum(positions_L + 1, jnp.minimum(bar_L1[:-1], size - 1)),
    )


def _first(key: jax.Array, start_L: jax.Array, among_L: jax.Array, k_L: jax.Array) -> jax.Array:
    """Returns k random positions of `among_L` in each document, which must have at least k, bool [L]."""
    scores_L = jnp.where(among_L, jax.random.uniform(key, start_L.shape), 2.0)
    order_L = jnp.lexsort((scores_L, start_L))  # keeps the documents in order
    rank_L = jnp.arange(start_L.shape[0]) - start_L
    return jnp.zeros_like(among_L).at[order_L].set(rank_L < k_L)
