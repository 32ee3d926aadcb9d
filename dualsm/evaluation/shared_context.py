"""Scoring of completions in the modes causal and prefix, with one pass over each context.

In these modes no token of a context attends to a completion. Therefore a context runs through the model once
for all its completions. All matrix products are over rows of T tokens that are packed without padding; only
attention uses padded arrays of contexts and completions. Contexts are padded on the left, so that each token
of a completion attends to one contiguous range of keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dualsm.evaluation.target_scores import target_scores
from dualsm.model.attention import attend
from dualsm.model.rope import layer_angles
from dualsm.model.transformer import Block, Transformer

_MAX_COMPLETIONS = 8  # per group
_MAX_PADDING = 16  # padded keys per token of a row
_LOOK_AHEAD = 64  # groups
_MIN_CONTEXT, _MIN_COMPLETION, _SCORED_MULTIPLE = 16, 8, 256  # padded sizes


class Group(NamedTuple):
    """A context and some of its completions.

    Attributes:
      context: token ids, `<s>` first.
      items: index of the item of each completion.
      completions: token ids of each completion, at least one.
    """

    context: tuple[int, ...]
    items: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    def size(self) -> int:
        """Returns the number of tokens that run through the model: all but the last of each completion."""
        return len(self.context) + sum(len(completion) - 1 for completion in self.completions)


class PackedRows(NamedTuple):
    """N rows of T packed tokens, of up to B groups with up to C completions each; R = B * C.

    Attributes:
      tokens_NxT: token ids; padding at the end.
      position_NxT: position of each token in its text, for the rotary embedding.
      context_NxBxL: index in T of each token of a context; padding on the left.
      offset_NxB: number of padding tokens before each context.
      inside_NxRxW: index in T of each token of a completion, without the last; padding on the right.
      origin_NxT: index of each token among the tokens of all padded contexts, then of all padded completions.
      scored_NxQ: index in T of each position whose next token is scored.
      target_NxQ: the token after each of these positions.
    """

    tokens_NxT: np.ndarray
    position_NxT: np.ndarray
    context_NxBxL: np.ndarray
    offset_NxB: np.ndarray
    inside_NxRxW: np.ndarray
    origin_NxT: np.ndarray
    scored_NxQ: np.ndarray
    target_NxQ: np.ndarray


def make_groups(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Group]:
    """Groups items whose contexts are equal.

    Args:
      pairs: context, `<s>` first, and completion of each item.
    """
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        by_context.setdefault(context, []).append(index)
    groups = []
    for context, items in by_context.items():
        for start in range(0, len(items), _MAX_COMPLETIONS):
            members = tuple(items[start : start + _MAX_COMPLETIONS])
            groups.append(Group(context, members, tuple(pairs[i][1] for i in members)))
    return groups


def fill_rows(groups: Sequence[Group], row_tokens: int) -> Iterator[list[Group]]:
    """Divides groups into rows of up to `row_tokens` tokens; a larger group fills a row alone.

    Groups of similar sizes share a row. A group that does not fit waits for the next row, while up to
    `_LOOK_AHEAD` groups after it may fill this one. Padding for attention is limited to
    `_MAX_PADDING * row_tokens` keys per row; many short contexts beside a long one would have more.
    """
    waiting = sorted(groups, key=lambda g: (len(g.items), len(g.context), g.size()), reverse=True)
    while waiting:
        row, skipped = [waiting.pop(0)], 0
        while skipped < min(_LOOK_AHEAD, len(waiting)):
            longer = [*row, waiting[skipped]]
            if _tokens(longer) <= row_tokens and _padded_keys([longer]) <= _MAX_PADDING * row_tokens:
                row = longer
                del waiting[skipped]
            else:
                skipped += 1
        yield row


def batch_rows(rows: Iterable[list[Group]], row_tokens: int, num_rows: int) -> Iterator[list[list[Group]]]:
    """Divides rows into batches of up to `num_rows` rows, whose common shape has limited padding, too."""
    batch: list[list[Group]] = []
    for row in rows:
        longer = [*batch, row]
        if batch and (len(longer) > num_rows or _padded_keys(longer) > _MAX_PADDING * row_tokens):
            yield batch
            longer = [row]
        batch = longer
    if batch:
        yield batch


def _tokens(row: Sequence[Group]) -> int:
    return sum(group.size() for group in row)


def _attention_sizes(rows: Sequence[Sequence[Group]]) -> tuple[int, int, int, int]:
    """Returns the padded sizes B, C, L and W of `PackedRows`."""
    groups = [group for row in rows for group in row]
    return (
        bucket(max(map(len, rows)), 1),
        bucket(max(len(group.items) for group in groups), 1),
        bucket(max(len(group.context) for group in groups), _MIN_CONTEXT),
        bucket(max(len(c) - 1 for group in groups for c in group.completions), _MIN_COMPLETION),
    )


def _padded_keys(rows: Sequence[Sequence[Group]]) -> int:
    """Returns the number of keys per row in the padded arrays of contexts and of completions."""
    B, C, L, W = _attention_sizes(rows)
    return B * L + B * C * (L + W)


def pack(rows: Sequence[Sequence[Group]], row_tokens: int, num_rows: int, pad: int) -> PackedRows:
    """Packs rows of groups, see `fill_rows`, into arrays of `num_rows` rows of at least `row_tokens` tokens.

    Args:
      rows: groups of each row.
      row_tokens: tokens per row; rounded up to a power of two if a row has more tokens.
      num_rows: number of rows; missing rows are padding.
      pad: id of `<pad>`.
    """
    total = max(map(_tokens, rows))
    T = row_tokens if total <= row_tokens else bucket(total, row_tokens)
    B, C, L, W = _attention_sizes(rows)
    scored = max(sum(len(c) for g in row for c in g.completions) for row in rows)
    Q = -(-scored // _SCORED_MULTIPLE) * _SCORED_MULTIPLE
    packed = PackedRows(
        tokens_NxT=np.full((num_rows, T), pad, np.int32),
        position_NxT=np.zeros((num_rows, T), np.int32),
        context_NxBxL=np.zeros((num_rows, B, L), np.int32),
        offset_NxB=np.full((num_rows, B), L - 1, np.int32),
        inside_NxRxW=np.zeros((num_rows, B * C, W), np.int32),
        origin_NxT=np.zeros((num_rows, T), np.int32),
        scored_NxQ=np.zeros((num_rows, Q), np.int32),
        target_NxQ=np.zeros((num_rows, Q), np.int32),
    )
    for n, row in enumerate(rows):
        t = q = 0
        for b, group in enumerate(row):
            length = len(group.context)
            end = t + length
            offset = L - length
            packed.tokens_NxT[n, t:end] = group.context
            packed.position_NxT[n, t:end] = np.arange(length)
            packed.context_NxBxL[n, b, offset:] = np.arange(t, end)
            packed.offset_NxB[n, b] = offset
            packed.origin_NxT[n, t:end] = b * L + np.arange(offset, L)
            last, t = end - 1, end
            for c, completion in enumerate(group.completions):
                size = len(completion) - 1
                inside = np.arange(t, t + size)
                packed.tokens_NxT[n, inside] = completion[:-1]
                packed.position_NxT[n, inside] = np.arange(length, length + size)
                packed.inside_NxRxW[n, b * C + c, :size] = inside
                packed.origin_NxT[n, inside] = B * L + (b * C + c) * W + np.arange(size)
                packed.scored_NxQ[n, q : q + size + 1] = [last, *inside]
                packed.target_NxQ[n, q : q + size + 1] = completion
                t, q = t + size, q + size + 1
    return packed


def score_rows(model: Transformer, rows: PackedRows, bidirectional: bool) -> tuple[jax.Array, jax.Array]:
    """Scores the targets of packed rows.

    Args:
      model: the model.
      rows: the packed rows.
      bidirectional: if True, attention within a context is bidirectional.

    Returns:
      Negative log-likelihood of each target, float32 [N, Q], and True where the target is the argmax.
    """
    features_NxTxD = _features(model, rows, bidirectional)
    return target_scores(model, _take(features_NxTxD, rows.scored_NxQ), rows.target_NxQ)


def _features(model: Transformer, rows: PackedRows, bidirectional: bool) -> jax.Array:
    """Returns the features at each packed token, [N, T, D]."""
    num_rows, size = rows.tokens_NxT.shape
    _, num_groups, L = rows.context_NxBxL.shape
    _, num_completions, W = rows.inside_NxRxW.shape
    per_group = num_completions // num_groups
    offset_B = rows.offset_NxB.reshape(-1)
    position_L, position_W = jnp.arange(L), L + jnp.arange(W)
    is_padding_BxL = position_L < offset_B[:, None]
    start_BxL = jnp.where(is_padding_BxL, 0, offset_B[:, None])
    end_BxL = jnp.where(is_padding_BxL | (not bidirectional), position_L + 1, L)
    start_RxW = jnp.repeat(offset_B, per_group)[:, None] + jnp.zeros(W, jnp.int32)
    end_RxW = jnp.broadcast_to(position_W + 1, start_RxW.shape)
    angles = model.rope.angles(rows.position_NxT)

    def layer(block: Block, is_rotated, x_TxD):
        qkv = block.attention.project(x_TxD, num_rows, layer_angles(angles, is_rotated))
        in_contexts = [_take(x, rows.context_NxBxL).reshape(-1, L, *x.shape[2:]) for x in qkv]
        inside = [_take(x, rows.inside_NxRxW).reshape(-1, W, *x.shape[2:]) for x in qkv]
        contexts_BxLxHxK = attend(*in_contexts, start_BxL, end_BxL, block.backend)
        keys, values = (
            jnp.concatenate([jnp.repeat(context, per_group, axis=0), own], axis=1)
            for context, own in zip(in_contexts[1:], inside[1:], strict=True)
        )
        inside_RxWxHxK = attend(inside[0], keys, values, start_RxW, end_RxW, "xla")
        padded = [x.reshape(num_rows, -1, *x.shape[2:]) for x in (contexts_BxLxHxK, inside_RxWxHxK)]
        attended_NxTxHxK = _take(jnp.concatenate(padded, axis=1), rows.origin_NxT)
        x_TxD = x_TxD + block.attention.merge(attended_NxTxHxK)
        return x_TxD + block.mlp(x_TxD)

    x_TxD = model.embedding(rows.tokens_NxT.reshape(-1))
    scan = nnx.scan(layer, in_axes=(0, 0, nnx.Carry), out_axes=nnx.Carry)
    x_TxD = scan(model.blocks, model.rotated_N, x_TxD)
    return model.head.features(x_TxD).reshape(num_rows, size, -1)


def _take(x_NxT: jax.Array, index_Nx: jax.Array) -> jax.Array:
    """Returns `x[n, index[n]]` for each row n, [N, ..., rest of x's shape]."""
    return jax.vmap(lambda x_T, index: x_T[index])(x_NxT, index_Nx)


def bucket(size: int, smallest: int) -> int:
    """Returns the smallest power of two that is at least `size` and `smallest`."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())
