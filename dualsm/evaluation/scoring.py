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
from dualsm.evaluation.modes import ScoredSequence, ScoringParams, make_sequences
from dualsm.model.transformer import bind
from dualsm.process.errors import UserError
from dualsm.process.progress import bar

_MIN_BUCKET = 16  # tokens
_BATCH_TOKENS = 8192  # per device and forward pass
_LOGITS_CHUNK = 1024  # positions per device whose logits are in memory at the same time


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
    return batch_devices(mesh) * max(1, _BATCH_TOKENS // length)


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
        sequences_per_item = np.zeros(len(distinct), int)

        def sequences() -> Iterator[ScoredSequence]:
            for index, (context, completion) in enumerate(distinct):
                made = make_sequences(index, [special.bos, *context], list(completion), scoring, special.mask)
                sequences_per_item[index] = len(made)
                yield from made

        with bar(total=len(distinct), desc=label or scoring.mode, unit="item", disable=quiet) as progress:
            done = 0.0
            batches = _batches(sequences(), self._batch_size)
            for batch, results in _with_lookahead(batches, self._score):
                for sequence, nll, is_greedy in zip(batch, *jax.device_get(results), strict=False):
                    totals[sequence.item] -= sequence.weight * nll
                    greedy[sequence.item] &= bool(is_greedy)
                done += sum(1 / sequences_per_item[sequence.item] for sequence in batch)
                progress.update(round(done) - progress.n)
        if not np.isfinite(totals[:-1]).all():
            count = int((~np.isfinite(totals[:-1])).sum())
            raise UserError(
                f"{count} scores are not finite, because training diverged; use an earlier checkpoint"
            )
        forwards = int(sequences_per_item.sum())
        return Scores(totals[index_N], greedy[index_N], tokens_N, truncated_N, forwards)

    def _batch_size(self, length: int) -> int:
        return scoring_batch_size(self._mesh, length)

    def _score(self, batch: list[ScoredSequence]) -> tuple[jax.Array, jax.Array]:
        """Returns the negative log-likelihood of each sequence, and True where all targets are the argmax."""
        length = _bucket(max(len(sequence.tokens) for sequence in batch))
        scored = 1 if max(len(sequence.positions) for sequence in batch) == 1 else length
        size = self._batch_size(length)
        tokens_BxL = np.full((size, length), self._tokenizer.special.pad, np.int32)
        prefix_end_B, position_BxP, target_BxP, weight_BxP = (
            np.zeros(shape, np.int32) for shape in ((size,), *((size, scored),) * 3)
        )
        for b, sequence in enumerate(batch):
            tokens_BxL[b, : len(sequence.tokens)] = sequence.tokens
            prefix_end_B[b] = sequence.prefix_end
            position_BxP[b, : len(sequence.positions)] = sequence.positions
            target_BxP[b, : len(sequence.targets)] = sequence.targets
            weight_BxP[b, : len(sequence.positions)] = 1
        arrays = (tokens_BxL, prefix_end_B, position_BxP, target_BxP, weight_BxP)
        with jax.set_mesh(self._mesh):
            sharded = (shard_batch(self._mesh, a) for a in arrays)
            return _score_batch(self._config, self._params, *sharded)


@functools.partial(jax.jit, static_argnames="config")
def _score_batch(config, params, tokens_BxL, prefix_end_B, position_BxP, target_BxP, weight_BxP):
    """Sums -log p(target) over the scored positions of each sequence; see `Scorer._score`."""
    model = bind(config, params)
    ends_L = jnp.arange(1, tokens_BxL.shape[1] + 1)
    key_end_BxL = jnp.maximum(ends_L, prefix_end_B[:, None])
    features_BxLxD = model.features(tokens_BxL, jnp.zeros_like(tokens_BxL), key_end_BxL)
    features_BxPxD = jnp.take_along_axis(features_BxLxD, position_BxP[..., None], axis=1)
    kernel_DxV = model.head.output.kernel[...].astype(features_BxPxD.dtype)
    bias_V = model.output_bias().astype(jnp.float32)

    def score(features_BxD, target_B):
        logits_BxV = jnp.dot(features_BxD, kernel_DxV, preferred_element_type=jnp.float32) + bias_V
        nll_B = jax.nn.logsumexp(logits_BxV, -1) - jnp.take_along_axis(logits_BxV, target_B[:, None], 1)[:, 0]
        return nll_B, logits_BxV.argmax(-1) == target_B

    by_position = (features_BxPxD.swapaxes(0, 1), target_BxP.T)
    chunk_size = max(1, _LOGITS_CHUNK * tokens_BxL.shape[1] // _BATCH_TOKENS)
    nll_PxB, is_argmax_PxB = jax.lax.map(lambda part: score(*part), by_position, batch_size=chunk_size)
    is_scored_PxB = weight_BxP.T > 0
    return (nll_PxB * is_scored_PxB).sum(0), (is_argmax_PxB | ~is_scored_PxB).all(0)


def _bucket(length: int) -> int:
    """Returns the smallest power of two that is at least `length` and `_MIN_BUCKET`."""
    return max(_MIN_BUCKET, 1 << (length - 1).bit_length())


def _batches(
    sequences: Iterable[ScoredSequence], batch_size: Callable[[int], int]
) -> Iterator[list[ScoredSequence]]:
    """Groups sequences by bucket, and by whether one or several positions are scored."""
    groups: dict[tuple[int, bool], list[ScoredSequence]] = {}
    for sequence in sequences:
        key = _bucket(len(sequence.tokens)), len(sequence.positions) == 1
        members = groups.setdefault(key, [])
        members.append(sequence)
        if len(members) == batch_size(key[0]):
            yield groups.pop(key)
    for _, members in sorted(groups.items()):
        yield members


def _with_lookahead(
    batches: Iterable[list[ScoredSequence]], score: Callable
) -> Iterator[tuple[list[ScoredSequence], Any]]:
    """Yields each batch with its results, after dispatching the next batch to the devices."""
    pending = None
    for batch in batches:
        results = score(batch)
        if pending:
            yield pending
        pending = batch, results
    if pending:
        yield pending
