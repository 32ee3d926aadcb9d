"""Log-likelihood of a completion after a context, in every mode a dual model can be used in.

Whatever the mode, an item becomes rows of one form: tokens, how far the bidirectional part reaches, and the
positions to score with their weights. One jitted function scores them all; a mode is how rows are made
(`dualsm/evaluation/modes.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from dualsm.data.tokenizer import Tokenizer
from dualsm.devices.sharding import batch_devices, shard_batch
from dualsm.evaluation.modes import Row, Scoring, make_rows
from dualsm.model.transformer import bind
from dualsm.process.errors import UserError
from dualsm.process.progress import bar

_SHORTEST = 16  # tokens of the shortest bucket
_BATCH_TOKENS = 8192  # tokens a device scores at once
_LOGITS_AT_ONCE = 1024  # positions whose logits a device holds at once


class Item(NamedTuple):
    """What to score: the completion after the context, both as text."""

    context: str
    completion: str


class Scores(NamedTuple):
    """Results for N items, in order.

    Attributes:
      log_likelihood_N: nats; NaN for a completion without tokens or with too many for a row.
      greedy_N: True where each token of the completion is the likeliest one (one forward; only meaningful in
        the modes causal and prefix).
      tokens_N: tokens of each completion.
      cut_N: True where the context lost its beginning.
      forwards: rows that went through the model.
    """

    log_likelihood_N: np.ndarray
    greedy_N: np.ndarray
    tokens_N: np.ndarray
    cut_N: np.ndarray
    forwards: int


def encode_pair(tokenizer: Tokenizer, item: Item) -> tuple[list[int], list[int]]:
    """Returns the tokens of context and completion; those of the completion decode to the completion.

    Together they are the tokens of the whole text, unless one of its tokens spans the border. The two are
    then encoded separately, because the completion would otherwise lose its first characters. Whitespace at
    the end of the context belongs to the completion, as in EleutherAI's harness.

    Raises:
      UserError: when the completion is empty.
    """
    context, completion = item
    if not completion:
        raise UserError(f"an empty completion cannot be scored (after the context {context[-40:]!r})")
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, completion = context[:-blanks], context[-blanks:] + completion
    whole, first = tokenizer.encode([context + completion, context])
    rest = whole[len(first) :]
    if not rest or whole[: len(first)] != first:
        (rest,) = tokenizer.encode([completion], inside=bool(context))
    return first, rest


def sequences_at_once(mesh: jax.sharding.Mesh, length: int) -> int:
    """How many rows of `length` tokens the devices of a mesh score at once, all of them together."""
    return batch_devices(mesh) * max(1, _BATCH_TOKENS // length)


class Scorer:
    """Scores items with a model's parameters."""

    def __init__(self, config: FrozenConfigDict, params: dict, tokenizer: Tokenizer, mesh: jax.sharding.Mesh):
        """
        Args:
          config: `config.model`, frozen.
          params: parameters.
          tokenizer: the model's.
          mesh: whose devices share the rows.
        """
        self._config, self._params, self._tokenizer, self._mesh = config, params, tokenizer, mesh

    def __call__(
        self, items: Sequence[Item], scoring: Scoring, label: str = "", quiet: bool = False
    ) -> Scores:
        """Scores items of text.

        Raises:
          UserError: for an empty completion, and when the model's scores are not finite.
        """
        pairs = [encode_pair(self._tokenizer, item) for item in items]
        return self.score_tokens(pairs, scoring, label, quiet)

    def score_tokens(
        self,
        pairs: Sequence[tuple[list[int], list[int]]],
        scoring: Scoring,
        label: str = "",
        quiet: bool = False,
    ) -> Scores:
        """Scores items of token ids (without `<s>`, which is put in front).

        Equal items are scored once, so that their scores are equal to the last bit.

        Raises:
          UserError: when the model's scores are not finite.
        """
        special = self._tokenizer.special
        tokens_N = np.array([len(completion) for _, completion in pairs], int)
        room_N = scoring.longest - 1 - tokens_N
        scored_N = (tokens_N > 0) & (room_N >= 0)
        cut_N = scored_N & (np.array([len(context) for context, _ in pairs], int) > room_N)
        distinct: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        number_N = np.full(len(pairs), -1)
        for i in np.flatnonzero(scored_N):
            context, completion = pairs[i]
            kept = context[max(0, len(context) - room_N[i]) :]
            number_N[i] = distinct.setdefault((tuple(kept), tuple(completion)), len(distinct))
        totals, greedy = np.zeros(len(distinct) + 1), np.ones(len(distinct) + 1, bool)
        totals[-1], greedy[-1] = np.nan, False  # of the items that are not scored
        rows_of = np.zeros(len(distinct), int)

        def rows() -> Iterator[Row]:
            for number, (context, completion) in enumerate(distinct):
                made = make_rows(number, [special.bos, *context], list(completion), scoring, special.mask)
                rows_of[number] = len(made)
                yield from made

        with bar(total=len(distinct), desc=label or scoring.mode, unit="item", disable=quiet) as progress:
            done = 0.0
            for batch, results in _one_ahead(_batches(rows(), self._batch_size), self._score):
                for row, nll, likeliest in zip(batch, *jax.device_get(results), strict=False):
                    totals[row.item] -= row.weight * nll
                    greedy[row.item] &= bool(likeliest)
                done += sum(1 / rows_of[row.item] for row in batch)
                progress.update(round(done) - progress.n)
        if not np.isfinite(totals[:-1]).all():
            raise UserError("the model's scores are not finite; its training diverged")
        return Scores(totals[number_N], greedy[number_N], tokens_N, cut_N, int(rows_of.sum()))

    def _batch_size(self, length: int) -> int:
        return sequences_at_once(self._mesh, length)

    def _score(self, batch: list[Row]) -> tuple[jax.Array, jax.Array]:
        """Sum of nll and whether all targets are the likeliest, for each row of a batch of one shape."""
        length = _bucket(max(len(row.tokens) for row in batch))
        scored = 1 if max(len(row.positions) for row in batch) == 1 else length
        size = self._batch_size(length)
        tokens_BxL = np.full((size, length), self._tokenizer.special.pad, np.int32)
        prefix_end_B, position_BxP, target_BxP, weight_BxP = (
            np.zeros(shape, np.int32) for shape in ((size,), *((size, scored),) * 3)
        )
        for b, row in enumerate(batch):
            tokens_BxL[b, : len(row.tokens)] = row.tokens
            prefix_end_B[b] = row.prefix_end
            for places, values in ((position_BxP, row.positions), (target_BxP, row.targets)):
                places[b, : len(values)] = values
            weight_BxP[b, : len(row.positions)] = 1
        arrays = (tokens_BxL, prefix_end_B, position_BxP, target_BxP, weight_BxP)
        with jax.set_mesh(self._mesh):
            placed = (shard_batch(self._mesh, a) for a in arrays)
            return _score_rows(self._config, self._params, *placed)


@functools.partial(jax.jit, static_argnames="config")
def _score_rows(config, params, tokens_BxL, prefix_end_B, position_BxP, target_BxP, weight_BxP):
    """Sum over the scored positions of a row of -log p(target), and whether all targets are likeliest."""
    model = bind(config, params)
    ends_L = jnp.arange(1, tokens_BxL.shape[1] + 1)
    key_end_BxL = jnp.maximum(ends_L, prefix_end_B[:, None])
    features_BxLxD = model.features(tokens_BxL, jnp.zeros_like(tokens_BxL), key_end_BxL)
    features_BxPxD = jnp.take_along_axis(features_BxLxD, position_BxP[..., None], axis=1)
    kernel_DxV = model.head.output.kernel[...].astype(features_BxPxD.dtype)
    bias_V = model.head.output.bias[...].astype(jnp.float32)

    def one(features_BxD, target_B):
        logits_BxV = jnp.dot(features_BxD, kernel_DxV, preferred_element_type=jnp.float32) + bias_V
        nll_B = jax.nn.logsumexp(logits_BxV, -1) - jnp.take_along_axis(logits_BxV, target_B[:, None], 1)[:, 0]
        return nll_B, logits_BxV.argmax(-1) == target_B

    by_position = (features_BxPxD.swapaxes(0, 1), target_BxP.T)
    at_once = max(1, _LOGITS_AT_ONCE * tokens_BxL.shape[1] // _BATCH_TOKENS)
    nll_PxB, likeliest_PxB = jax.lax.map(lambda part: one(*part), by_position, batch_size=at_once)
    loss_denominator_PxB = weight_BxP.T > 0
    return (nll_PxB * loss_denominator_PxB).sum(0), (likeliest_PxB | ~loss_denominator_PxB).all(0)


def _bucket(length: int) -> int:
    """The least power of two that holds `length` tokens."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def _batches(rows: Iterable[Row], size_of: Callable[[int], int]) -> Iterator[list[Row]]:
    """Rows in batches of one bucket each, and of one kind: one position a row, or many."""
    buckets: dict[tuple[int, bool], list[Row]] = {}
    for row in rows:
        kind = _bucket(len(row.tokens)), len(row.positions) == 1
        members = buckets.setdefault(kind, [])
        members.append(row)
        if len(members) == size_of(kind[0]):
            yield buckets.pop(kind)
    for _, members in sorted(buckets.items()):
        yield members


def _one_ahead(batches: Iterable[list[Row]], score: Callable) -> Iterator[tuple[list[Row], Any]]:
    """Batches with their results, each handed on only when the next one is under way on the device."""
    waiting = None
    for batch in batches:
        result = score(batch)
        if waiting:
            yield waiting
        waiting = batch, result
    if waiting:
        yield waiting
