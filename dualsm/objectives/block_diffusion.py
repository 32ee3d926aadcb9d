"""Block diffusion: attention is bidirectional within a block of tokens and causal across blocks.

Source: BD3-LM (arXiv 2503.09573) for diffusion in blocks. Its doubled sequence, which shows clean earlier
blocks to noisy ones, needs two key ranges per query and is not implemented. Instead, earlier blocks are as
noisy as the block itself (`form="noisy"`), or only one block per document is masked (`form="tail"`; CARD,
arXiv 2601.22031, masks tails too, but with causal attention).
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
    count,
    document_spans,
    has_target,
    is_text,
)
from dualsm.objectives.masked_diffusion import masked_diffusion
from dualsm.objectives.masking import hide
from dualsm.objectives.prefix import draw_prefix_end
from dualsm.objectives.registry import Option, objective
from dualsm.process.value_rules import at_least, one_of

FORMS = ("noisy", "tail")


@objective(
    order=9,
    view="block",
    sees="the document up to the end of the block of x_i, masked",
    predicts="x_{i+1} where it is masked",
    averages_over="all text, weighted: a likelihood bound (`tail`: the targets of the block)",
    block=Option(
        "Tokens per block; 0: a power of two, at most the sequence length, drawn for each row.",
        at_least(0),
        defines_task=True,
    ),
    form=Option(
        '`"noisy"`: all blocks have masks. `"tail"`: each document ends in one masked block, after a clean '
        "causal context.",
        one_of(FORMS),
        defines_task=True,
    ),
)
def block_diffusion(
    row: Row, key: jax.Array, special: SpecialIds, block: int = 32, form: str = "noisy"
) -> Example:
    """Predicts masked tokens from blocks up to their own.

    The blocks of a document contain `block` input tokens each, counted from the document's first token in the
    row. Position i attends to the document up to the end of its block. The last position of a block therefore
    predicts the first token of the next block without attending to that block.

    With `form="noisy"`, masks and weights are those of `masked_diffusion`: k of the row's n maskable tokens
    are masked, each with the weight n/k. The loss is a likelihood bound, because each factor of an any-order
    model may ignore some of the tokens that are already known. `block=1` is causal prediction from masked
    inputs; with `block` of at least L the examples are those of `masked_diffusion`.

    With `form="tail"`, only one block of up to `block` targets per document has loss, see `_tail`.
    """
    length = row.tokens_L1.shape[0] - 1
    if block:
        size = min(block, length)
    else:
        key, size_key = jax.random.split(key)
        size = 2 ** below(jax.random.uniform(size_key), length.bit_length())
    if form == "tail":
        return _tail(row, key, special, size)
    example = masked_diffusion(row, key, special)
    return example._replace(key_end_L=block_ends(example.key_start_L, example.key_end_L, size))


def block_ends(start_L: jax.Array, end_L: jax.Array, size: jax.Array | int) -> jax.Array:
    """Returns the exclusive end of the block at each position, int32 [L].

    Args:
      start_L, end_L: start and exclusive end of the document at each position, int32 [L].
      size: input tokens per block.
    """
    positions_L = jnp.arange(start_L.shape[0], dtype=jnp.int32)
    return jnp.minimum(start_L + ((positions_L - start_L) // size + 1) * size, end_L)


def _tail(row: Row, key: jax.Array, special: SpecialIds, size: jax.Array | int) -> Example:
    """Returns an example with the inputs of a draft of `size` tokens in each document.

    A document is cut at random, as in `prefix`. The next `size` tokens are the targets of the block. The last
    token before the cut predicts the first of them; masks replace all but the last of them, attend to the
    context and to each other, and predict the others. All other positions attend causally. Tokens after the
    block have no loss, and no position with loss attends to them.

    With n targets in a document, m of them in the block, each of these has the weight n/m. A row therefore
    counts as much as a row of other objectives.
    """
    positions_L = jnp.arange(row.tokens_L1.shape[0] - 1, dtype=jnp.int32)
    start_L1, end_L1 = document_spans(row.documents_L1)
    cut_L, has_target_L = draw_prefix_end(row, key), has_target(row)
    last_L = jnp.minimum(cut_L + size, end_L1[:-1]) - 1  # position of the last target
    is_target_L = has_target_L & (positions_L + 1 >= cut_L) & (positions_L + 1 <= last_L)
    masked_L = is_target_L & (positions_L + 1 < last_L) & is_text(row.tokens_L1[1:])
    scored_L = masked_L | (is_target_L & (positions_L + 1 == last_L))

    def total(flags_L: jax.Array) -> jax.Array:
        return count(jnp.append(flags_L, False), start_L1)[end_L1 - 1][:-1]

    n_L, m_L = total(has_target_L), total(scored_L)
    inputs_L = hide(row.tokens_L1[:-1], masked_L, special.mask)
    example = causal_example(row, inputs_L, row.tokens_L1[1:], has_target_L & (m_L > 0))
    in_block_L = (positions_L >= cut_L) & (positions_L < last_L)
    return example._replace(
        weights_L=jnp.where(scored_L, n_L / jnp.maximum(m_L, 1), 0.0),
        key_end_L=jnp.where(in_block_L, last_L, example.key_end_L),
    )
