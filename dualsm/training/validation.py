"""Validation: the held-out loss of each objective, with the same rows and corruption in every run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dualsm.data.batches import PAD_DOCUMENT, read_sequences
from dualsm.data.documents import Documents
from dualsm.data.sequence_order import SequenceOrder
from dualsm.devices.sharding import constrain, replicated, shard_batch
from dualsm.model import transformer
from dualsm.objectives import mixture
from dualsm.objectives.example import Row, SpecialIds
from dualsm.objectives.pairs import bind_members, entry, members_of
from dualsm.objectives.registry import valid_options
from dualsm.training.objective_loss import example_loss
from dualsm.training.run_corpora import RunCorpus

_SEED = 20251214  # of the corruption; independent of the run's seed, so that runs are comparable
# Maximum number of dispatched batches: enough to keep devices busy. Above 32, XLA's CPU client can deadlock,
# because the threads that launch programs wait for a slot that only a blocked program would free.
_MAX_IN_FLIGHT = 4
INEXACT_BYTES = (
    "the corpus does not store the sizes of its documents, so bits per byte use the bytes of the tokens; "
    "prepare the corpus again for exact values"
)
_DOCUMENTS_PER_READ = 1024


class ValidRows(NamedTuple):
    """Held-out documents packed into rows, and their sizes in bytes.

    Attributes:
      tokens_VxL1: int32; token ids.
      documents_VxL1: int32; index of each token's document within the row, `PAD_DOCUMENT` for padding.
      scale_VxL1: float32; factor on `token_bytes_V`. With this factor the bytes of a document's tokens sum to
        the bytes of its text. A document that is split between two rows has the same factor in both.
      token_bytes_V: float32; bytes of text per token.
      exact: False if the corpus does not store the sizes of its documents; all factors are then 1.
    """

    tokens_VxL1: np.ndarray
    documents_VxL1: np.ndarray
    scale_VxL1: np.ndarray
    token_bytes_V: np.ndarray
    exact: bool


def valid_rows(
    documents: Documents, seq_len: int, rows: int, special: SpecialIds, token_bytes_V: np.ndarray
) -> ValidRows:
    """Packs the held-out documents into rows, in corpus order.

    Args:
      documents: the held-out split.
      seq_len: L.
      rows: maximum number of rows; 0: all.
      special: special ids; `pad` fills the last row.
      token_bytes_V: from `Tokenizer.token_bytes`.
    """
    order = SequenceOrder(documents.lengths_N, documents.tokens, seq_len)
    row_V = np.arange(min(order.num_sequences, rows) if rows else order.num_sequences)
    tokens_VxL1, documents_VxL1 = read_sequences(documents, order, row_V, seq_len, special.pad)
    scale_VxL1 = np.ones(tokens_VxL1.shape, np.float32)
    if documents.bytes_N is not None:
        segments = order.segments(row_V)
        count = int(segments.document_S.max()) + 1  # documents are in corpus order
        token_bytes_V, scale_N = _fit_to_documents(documents, count, special.unk, token_bytes_V)
        scale_S = scale_N[segments.document_S]
        scale_VxL1[documents_VxL1 != PAD_DOCUMENT] = np.repeat(scale_S, segments.stop_S - segments.start_S)
    return ValidRows(
        tokens_VxL1,
        documents_VxL1,
        scale_VxL1,
        token_bytes_V.astype(np.float32),
        documents.bytes_N is not None,
    )


def rows_by_source(corpora: Sequence[RunCorpus], seq_len: int, rows: int) -> dict[str, ValidRows]:
    """Returns the held-out rows of each source by its name; see `valid_rows`."""
    found = {}
    for source, corpus in corpora:
        tokenizer = corpus.tokenizer()
        found[source.name] = valid_rows(
            corpus.documents("valid"), seq_len, rows, tokenizer.special, tokenizer.token_bytes()
        )
    return found


def _fit_to_documents(
    documents: Documents, count: int, unk: int, token_bytes_V: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fits the bytes per token to the sizes of the first `count` documents.

    Documents are read completely, including the one that the last row cuts off. The bytes that the other
    tokens do not account for are divided equally among the `<unk>` tokens, so that objectives that never
    score `<unk>` are not credited with its bytes.

    Returns:
      `token_bytes_V` with a value for `<unk>`, and the factor `scale_N` of each document.
    """
    known_N, unknown_N = np.zeros(count), np.zeros(count)
    for first in range(0, count, _DOCUMENTS_PER_READ):
        indices = range(first, min(first + _DOCUMENTS_PER_READ, count))
        for index, tokens in zip(indices, documents.read(indices), strict=True):
            known_N[index] = token_bytes_V[tokens].sum()
            unknown_N[index] = (tokens == unk).sum()
    bytes_N = documents.bytes_N[:count]
    left = (bytes_N - known_N)[unknown_N > 0].sum()
    token_bytes_V = token_bytes_V.astype(np.float64)
    token_bytes_V[unk] = max(left, 0) / max(unknown_N.sum(), 1)
    sum_N = known_N + unknown_N * token_bytes_V[unk]
    return token_bytes_V, np.divide(bytes_N, sum_N, out=np.ones(count), where=sum_N > 0)


class Validation:
    """Scores the held-out rows of one corpus under several objectives with one compiled function.

    Attributes:
      names: the objectives.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        names: Sequence[str],
        special: SpecialIds,
        rows: ValidRows,
        mesh: jax.sharding.Mesh,
        samples: int = 1,
        batch_size: int | None = None,
    ):
        """
        Args:
          config: the run's config.
          names: objectives to score.
          special: the tokenizer's special ids.
          rows: from `valid_rows`.
          mesh: device mesh; each batch is sharded over its devices.
          samples: number of times that each row is scored, each time with a new corruption.
          batch_size: rows per batch, over all devices; None: the rows of a gradient accumulation step.
        """
        self.names = list(names)
        arrays = tuple(np.tile(a, (samples, 1)) for a in rows[:3])
        batch_size = batch_size or config.batch_size // config.gradient_accumulation_steps
        self._batches = [
            tuple(shard_batch(mesh, part) for part in batch)
            for batch in _batches(arrays, batch_size, special.pad)
        ]
        self._strata = len(arrays[0])
        options = {"objectives": valid_options(config.objectives)}
        objectives = bind_members(members_of([entry(name, options) for name in names]), special)
        token_bytes_V = jnp.asarray(rows.token_bytes_V)

        def score(params: dict, tokens_BxL1, documents_BxL1, scale_BxL1, stratum_B, objective: jax.Array):
            """Returns sums over a batch: loss in nats, loss denominator, bytes of the scored targets."""
            size = tokens_BxL1.shape[0]
            keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(_SEED), i))(stratum_B)
            strata_B = jnp.full(size, self._strata)
            row = Row(tokens_BxL1, documents_BxL1, stratum_B, strata_B, jnp.zeros(size))
            example = mixture.make_examples(objectives, row, jnp.full(size, objective), keys_B)
            example = jax.tree.map(lambda a: constrain(a, "batch", None), example)
            _, denominator, stats = example_loss(
                transformer.bind(config.model, params), example, config.loss.chunk_size
            )
            # Under every objective, position i and its target are in the same document.
            bytes_BxL = scale_BxL1[:, :-1] * token_bytes_V[example.targets_L]
            bytes_ = (example.loss_denominator_L * bytes_BxL).sum()
            return stats.nll_B.sum(), denominator, bytes_

        self._score = jax.jit(score, out_shardings=replicated(mesh))

    def __call__(
        self, params: dict, name: str, every: int = 1, stop: Callable[[], bool] = lambda: False
    ) -> np.ndarray | None:
        """Scores the held-out rows under one objective.

        Args:
          params: parameters.
          name: the objective.
          every: scores only every n-th batch. Each batch is a sample of the whole split.
          stop: called before each batch; True ends the scoring.

        Returns:
          Loss in nats, loss denominator and bytes of the scored targets, float64 [3]; None if `stop` returned
          True.
        """
        index = self.names.index(name)
        parts = []
        for batch in self._batches[::every]:
            if stop():
                return None
            parts.append(self._score(params, *batch, jnp.int32(index)))
            jax.block_until_ready(parts[-_MAX_IN_FLIGHT:][0])
        return np.array(jax.device_get(parts), np.float64).sum(0)


class SourceValidation:
    """Computes the held-out loss of each objective on each source, and over all sources."""

    def __init__(self, by_source: Mapping[str, Validation]):
        """
        Args:
          by_source: name of the source -> its held-out rows; one name "" for a run without `config.sources`.
        """
        self._by_source = by_source
        self._names = next(iter(by_source.values())).names

    def __call__(
        self,
        params: dict,
        names: Sequence[str] | None = None,
        every: int = 1,
        stop: Callable[[], bool] = lambda: False,
        prefix: str = "valid",
    ) -> dict[str, float] | None:
        """Scores the held-out rows.

        Args:
          params: parameters.
          names: objectives to score; None: all.
          every: see `Validation`.
          stop: called before each batch; True ends the scoring.
          prefix: prefix of the metrics.

        Returns:
          Metrics `<prefix>/<objective>/loss` (nats per token) and `<prefix>/<objective>/bits_per_byte` over
          the rows of all sources, and `<prefix>/<source>/<objective>/...` of each source with a name; None if
          `stop` returned True.
        """
        metrics = {}
        for name in self._names if names is None else names:
            sums = {}
            for source, validation in self._by_source.items():
                sums[source] = validation(params, name, every, stop)
                if sums[source] is None:
                    return None
            metrics |= _as_metrics(f"{prefix}/{name}", sum(sums.values()))
            for source, found in sums.items():
                if source:
                    metrics |= _as_metrics(f"{prefix}/{source}/{name}", found)
        return metrics


def _as_metrics(name: str, sums: np.ndarray) -> dict[str, float]:
    nats, denominator, bytes_ = sums
    return {
        f"{name}/loss": float(nats / max(denominator, 1)),
        f"{name}/bits_per_byte": float(nats / math.log(2) / max(bytes_, 1)),
    }


def _batches(rows: tuple[np.ndarray, np.ndarray, np.ndarray], size: int, pad: int):
    """Yields batches of `size` rows with the indices of the rows; pads the last batch with empty rows.

    Each of n batches takes every n-th row, so that it is a sample of the whole split.
    """
    missing = -len(rows[0]) % size
    fill = (pad, PAD_DOCUMENT, 1)
    arrays = [
        np.pad(a, [(0, missing), (0, 0)], constant_values=value) for a, value in zip(rows, fill, strict=True)
    ]
    index_V, batches = np.arange(len(arrays[0]), dtype=np.int32), len(arrays[0]) // size
    for first in range(batches):
        part = slice(first, None, batches)
        yield *(a[part] for a in arrays), index_V[part]
