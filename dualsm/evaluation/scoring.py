"""Scoring of completions after a context, in every mode.

`modes.py` converts items to sequences of a common form; one jitted function scores all of them.
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
from dualsm.evaluation import shared_context
from dualsm.evaluation.modes import ScoredSequence, ScoringParams, make_sequences
from dualsm.evaluation.shared_context import Group, PackedRows, bucket
from dualsm.evaluation.target_scores import target_scores
from dualsm.model.transformer import bind
from dualsm.process.errors import UserError
from dualsm.process.progress import bar

_MIN_BUCKET = 16  # tokens
_BATCH_TOKENS = 8192  # per device and forward pass
_CPU_BATCH_TOKENS = (
    2048  # larger ones are not faster on CPUs, and the last batch of each shape has more padding
)


class Item(NamedTuple):
    """A context and the completion to score after it."""

    context: str
    completion: str


class Scores(NamedTuple):
    """Scores of N items, in order.

    Attributes:
      log_likelihood_N: nats; NaN if the completion has no tokens or more than fit into a sequence.
      greedy_N: True if greedy decoding generates the completion (meaningful in the modes causal and prefix).
      tokens_N: number of tokens of each completion.
      truncated_N: True if the context was truncated.
      forwards: number of sequences that were scored.
    """

    log_likelihood_N: np.ndarray
    greedy_N: np.ndarray
    tokens_N: np.ndarray
    truncated_N: np.ndarray
    forwards: int


def encode_pair(tokenizer: Tokenizer, item: Item) -> tuple[list[int], list[int]]:
    """Encodes the context and the completion of an item.

    Their token ids are those of the whole text, split between the two. If a token spans the boundary, the two
    are encoded separately, so that the completion's tokens always decode to the whole completion. Whitespace
    at the end of the context is moved to the completion, as in lm-evaluation-harness.

    Raises:
      UserError: if the completion is empty.
    """
    context, completion = item
    if not completion:
        raise UserError(f"the completion after the context {context[-40:]!r} is empty; remove the item")
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, completion = context[:-blanks], context[-blanks:] + completion
    whole, first = tokenizer.encode([context + completion, context])
    rest = whole[len(first) :]
    if not rest or whole[: len(first)] != first:
        (rest,) = tokenizer.encode([completion], inside=bool(context))
    return first, rest


def scoring_batch_size(mesh: jax.sharding.Mesh, length: int) -> int:
    """Returns the number of sequences of `length` tokens per forward pass, over all devices of a mesh."""
    tokens = _CPU_BATCH_TOKENS if mesh.devices.flat[0].platform == "cpu" else _BATCH_TOKENS
    return batch_devices(mesh) * max(1, tokens // length)


class _Part(NamedTuple):
    """The scored positions of an item in a batch.

    Attributes:
      item: index of the item.
      weight: factor on the sum of the log-probabilities.
      scored: index of the positions in the arrays [B, P] of scores.
    """

    item: int
    weight: float
    scored: tuple[int, slice]


class Scorer:
    """Scores items with a model."""

    def __init__(self, config: FrozenConfigDict, params: dict, tokenizer: Tokenizer, mesh: jax.sharding.Mesh):
        """
        Args:
          config: `config.model`, frozen.
          params: parameters.
          tokenizer: the model's tokenizer.
          mesh: device mesh; each batch is sharded over its devices.
        """
        self._config, self._params, self._tokenizer, self._mesh = config, params, tokenizer, mesh

    def __call__(
        self, items: Sequence[Item], scoring: ScoringParams, label: str = "", quiet: bool = False
    ) -> Scores:
        """Scores items of text.

        Raises:
          UserError: if a completion is empty, or a score is not finite.
        """
        pairs = [encode_pair(self._tokenizer, item) for item in items]
        return self.score_tokens(pairs, scoring, label, quiet)

    def score_tokens(
        self,
        pairs: Sequence[tuple[list[int], list[int]]],
        scoring: ScoringParams,
        label: str = "",
        quiet: bool = False,
    ) -> Scores:
        """Scores pairs of context and completion, given as token ids without `<s>`, which is prepended.

        Equal pairs are scored once, so that their scores are bit-identical.

        Raises:
          UserError: if a score is not finite.
        """
        special = self._tokenizer.special
        tokens_N = np.array([len(completion) for _, completion in pairs], int)
        room_N = scoring.max_length - 1 - tokens_N
        scored_N = (tokens_N > 0) & (room_N >= 0)
        truncated_N = scored_N & (np.array([len(context) for context, _ in pairs], int) > room_N)
        distinct: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        index_N = np.full(len(pairs), -1)
        for i in np.flatnonzero(scored_N):
            context, completion = pairs[i]
            kept = context[max(0, len(context) - room_N[i]) :]
            index_N[i] = distinct.setdefault((tuple(kept), tuple(completion)), len(distinct))
        totals, greedy = np.zeros(len(distinct) + 1), np.ones(len(distinct) + 1, bool)
        totals[-1], greedy[-1] = np.nan, False  # index -1: pairs that are not scored
        sequences_per_item = np.ones(len(distinct), int)
        whole = [((special.bos, *context), completion) for context, completion in distinct]

        def sequences() -> Iterator[ScoredSequence]:
            for index, (context, completion) in enumerate(whole):
                made = make_sequences(index, list(context), list(completion), scoring, special.mask)
                sequences_per_item[index] = len(made)
                yield from made

        if scoring.mode in ("causal", "prefix"):
            batches = self._score_rows(whole, bidirectional=scoring.mode == "prefix")
        else:
            batches = self._score_sequences(sequences())
        with bar(total=len(distinct), desc=label or scoring.mode, unit="item", disable=quiet) as progress:
            done = 0.0
            for parts, results in _with_lookahead(batches):
                nll, is_argmax = jax.device_get(results)
                for part in parts:
                    totals[part.item] -= part.weight * nll[part.scored].sum(dtype=np.float64)
                    greedy[part.item] &= bool(is_argmax[part.scored].all())
                done += sum(1 / sequences_per_item[part.item] for part in parts)
                progress.update(round(done) - progress.n)
        if not np.isfinite(totals[:-1]).all():
            count = int((~np.isfinite(totals[:-1])).sum())
            raise UserError(
                f"{count} scores are not finite, because training diverged; use an earlier checkpoint"
            )
        forwards = int(sequences_per_item.sum())
        return Scores(totals[index_N], greedy[index_N], tokens_N, truncated_N, forwards)

    def _score_rows(self, pairs, bidirectional: bool) -> Iterator[tuple[list[_Part], tuple]]:
        """Scores pairs of context and completion in rows that share contexts; see `_Part`."""
        num_rows = batch_devices(self._mesh)
        row_tokens = scoring_batch_size(self._mesh, 1) // num_rows
        rows = shared_context.fill_rows(shared_context.make_groups(pairs), row_tokens)
        for batch in shared_context.batch_rows(rows, row_tokens, num_rows):
            packed = shared_context.pack(batch, row_tokens, num_rows, self._tokenizer.special.pad)
            results = self._run(functools.partial(_score_packed, bidirectional=bidirectional), packed)
            yield list(_parts_of_rows(batch)), results

    def _score_sequences(self, sequences: Iterable[ScoredSequence]) -> Iterator[tuple[list[_Part], tuple]]:
        """Scores sequences with bidirectional attention; see `_Part`."""
        for batch in _batches(sequences, functools.partial(scoring_batch_size, self._mesh)):
            parts = [
                _Part(sequence.item, sequence.weight, (b, slice(len(sequence.positions))))
                for b, sequence in enumerate(batch)
            ]
            yield parts, self._run(_score_batch, self._sequence_arrays(batch))

    def _run(self, function: Callable, arrays: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
        """Runs a scoring function on arrays whose rows are sharded over the devices."""
        with jax.set_mesh(self._mesh):
            return function(self._config, self._params, *(shard_batch(self._mesh, a) for a in arrays))

    def _sequence_arrays(self, batch: list[ScoredSequence]) -> tuple[np.ndarray, ...]:
        """Returns tokens [B, L], number of tokens [B], and scored positions and their targets [B, P]."""
        length = bucket(max(len(sequence.tokens) for sequence in batch), _MIN_BUCKET)
        scored = 1 if max(len(sequence.positions) for sequence in batch) == 1 else length
        size = scoring_batch_size(self._mesh, length)
        tokens_BxL = np.full((size, length), self._tokenizer.special.pad, np.int32)
        length_B = np.zeros(size, np.int32)
        position_BxP, target_BxP = np.zeros((2, size, scored), np.int32)
        for b, sequence in enumerate(batch):
            tokens_BxL[b, : len(sequence.tokens)] = sequence.tokens
            length_B[b] = len(sequence.tokens)
            position_BxP[b, : len(sequence.positions)] = sequence.positions
            target_BxP[b, : len(sequence.targets)] = sequence.targets
        return tokens_BxL, length_B, position_BxP, target_BxP


def _parts_of_rows(rows: Sequence[Sequence[Group]]) -> Iterator[_Part]:
    """Yields the part of each completion in `PackedRows`."""
    for n, row in enumerate(rows):
        start = 0
        for group in row:
            for item, completion in zip(group.items, group.completions, strict=True):
                yield _Part(item, 1.0, (n, slice(start, start + len(completion))))
                start += len(completion)


@functools.partial(jax.jit, static_argnames=("config", "bidirectional"))
def _score_packed(config, params, *arrays, bidirectional):
    """Scores packed rows; see `shared_context.score_rows`."""
    return shared_context.score_rows(bind(config, params), PackedRows(*arrays), bidirectional)


@functools.partial(jax.jit, static_argnames="config")
def _score_batch(config, params, tokens_BxL, length_B, position_BxP, target_BxP):
    """Scores sequences with bidirectional attention; see `Scorer._sequence_arrays` and `target_scores`."""
    model = bind(config, params)
    key_end_BxL = jnp.maximum(jnp.arange(1, tokens_BxL.shape[1] + 1), length_B[:, None])
    features_BxLxD = model.features(tokens_BxL, jnp.zeros_like(tokens_BxL), key_end_BxL)
    features_BxPxD = jnp.take_along_axis(features_BxLxD, position_BxP[..., None], axis=1)
    return target_scores(model, features_BxPxD, target_BxP)


def _batches(
    sequences: Iterable[ScoredSequence], batch_size: Callable[[int], int]
) -> Iterator[list[ScoredSequence]]:
    """Groups sequences by bucket, and by whether one or several positions are scored."""
    groups: dict[tuple[int, bool], list[ScoredSequence]] = {}
    for sequence in sequences:
        key = bucket(len(sequence.tokens), _MIN_BUCKET), len(sequence.positions) == 1
        members = groups.setdefault(key, [])
        members.append(sequence)
        if len(members) == batch_size(key[0]):
            yield groups.pop(key)
    for _, members in sorted(groups.items()):
        yield members


def _with_lookahead(batches: Iterable[tuple[list, Any]]) -> Iterator[tuple[list, Any]]:
    """Yields each batch with its results, after dispatching the next batch to the devices."""
    pending = None
    for batch in batches:
        if pending:
            yield pending
        pending = batch
    if pending:
        yield pending
