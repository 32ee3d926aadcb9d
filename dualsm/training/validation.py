"""Held-out loss of every objective, on the same rows with the same corruption in every run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from dualsm.objectives.registry import valid_options
from dualsm.training.objective_loss import example_loss

_SEED = 20251214  # of the corruption; never the run's seed, so that runs are compared on the same task
# Batches on their way at once: enough to keep devices busy. With over 32 XLA's CPU devices can stand still
# and end the process: the threads that start programs wait for a place, and what would make one gets none.
_AHEAD = 4
BYTES_OF_TOKENS = (
    "the corpus does not hold the bytes of its documents; bits per byte divide by bytes summed over tokens; "
    "prepare the corpus anew"
)
_DOCUMENTS_AT_ONCE = 1024  # read to count their bytes


class ValidRows(NamedTuple):
    """Held-out documents packed into rows, with what their bits per byte need.

    Attributes:
      tokens_VxL1: int32; token ids.
      documents_VxL1: int32; number of the document within the row, `PAD_DOCUMENT` after the end.
      scale_VxL1: float32; factor on `token_bytes_V` that makes the tokens of each document add up to the
        bytes of its text. Of a document that a row cuts, each part gets its share.
      token_bytes_V: float32; bytes of text that each token stands for.
      exact: False when the bytes of the documents are unknown and the sum over tokens takes their place.
    """

    tokens_VxL1: np.ndarray
    documents_VxL1: np.ndarray
    scale_VxL1: np.ndarray
    token_bytes_V: np.ndarray
    exact: bool


def valid_rows(
    documents: Documents, seq_len: int, rows: int, special: SpecialIds, token_bytes_V: np.ndarray
) -> ValidRows:
    """Packs the held-out documents into rows, in their order.

    Args:
      documents: the held-out split.
      seq_len: L.
      rows: at most this many rows; 0 takes all.
      special: its `pad` fills the last row.
      token_bytes_V: from `Tokenizer.token_bytes`.
    """
    order = SequenceOrder(documents.lengths_N, documents.tokens, seq_len)
    row_V = np.arange(min(order.num_sequences, rows) if rows else order.num_sequences)
    tokens_VxL1, documents_VxL1 = read_sequences(documents, order, row_V, seq_len, special.pad)
    scale_VxL1 = np.ones(tokens_VxL1.shape, np.float32)
    if documents.bytes_N is not None:
        segments = order.segments(row_V)
        read = int(segments.document_S.max()) + 1  # documents are in the order of the corpus
        token_bytes_V, scale_N = _fit_to_documents(documents, read, special.unk, token_bytes_V)
        scale_S = scale_N[segments.document_S]
        scale_VxL1[documents_VxL1 != PAD_DOCUMENT] = np.repeat(scale_S, segments.stop_S - segments.start_S)
    return ValidRows(
        tokens_VxL1,
        documents_VxL1,
        scale_VxL1,
        token_bytes_V.astype(np.float32),
        documents.bytes_N is not None,
    )


def _fit_to_documents(
    documents: Documents, count: int, unk: int, token_bytes_V: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fits the bytes of tokens to the bytes of the first `count` documents.

    Whole documents are read, also the one that the last row cuts. `<unk>` gets the mean of the bytes that the
    other tokens leave, so that objectives that never score it do not gain its bytes.

    Returns:
      token_bytes_V with `<unk>`, and scale_N, by which they are multiplied in each document.
    """
    known_N, unknown_N = np.zeros(count), np.zeros(count)
    for first in range(0, count, _DOCUMENTS_AT_ONCE):
        numbers = range(first, min(first + _DOCUMENTS_AT_ONCE, count))
        for number, tokens in zip(numbers, documents.read(numbers), strict=True):
            known_N[number] = token_bytes_V[tokens].sum()
            unknown_N[number] = (tokens == unk).sum()
    bytes_N = documents.bytes_N[:count]
    left = (bytes_N - known_N)[unknown_N > 0].sum()
    token_bytes_V = token_bytes_V.astype(np.float64)
    token_bytes_V[unk] = max(left, 0) / max(unknown_N.sum(), 1)
    sum_N = known_N + unknown_N * token_bytes_V[unk]
    return token_bytes_V, np.divide(bytes_N, sum_N, out=np.ones(count), where=sum_N > 0)


class Validation:
    """Scores parameters on fixed held-out rows under several objectives, all by one compiled function."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        names: Sequence[str],
        special: SpecialIds,
        rows: ValidRows,
        mesh: jax.sharding.Mesh,
        samples: int = 1,
        at_once: int | None = None,
    ):
        """
        Args:
          config: the run's config.
          names: objectives to score.
          special: the tokenizer's special ids.
          rows: from `valid_rows`.
          mesh: whose devices share the rows.
          samples: how often each row is scored, with other corruption each time.
          at_once: rows scored at once, over all devices; None: as many as in a microbatch of training.
        """
        self._names = list(names)
        arrays = tuple(np.tile(a, (samples, 1)) for a in rows[:3])
        at_once = at_once or config.batch_size // config.gradient_accumulation_steps
        self._batches = [
            tuple(shard_batch(mesh, part) for part in batch)
            for batch in _batches(arrays, at_once, special.pad)
        ]
        self._strata = len(arrays[0])
        objectives = mixture.bind(names, valid_options(config.objectives), special)
        token_bytes_V = jnp.asarray(rows.token_bytes_V)

        def score(params: dict, tokens_BxL1, documents_BxL1, scale_BxL1, stratum_B, objective: jax.Array):
            """Sums over a batch: nats, counted positions, and bytes of the counted targets."""
            size = tokens_BxL1.shape[0]
            keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(_SEED), i))(stratum_B)
            strata_B = jnp.full(size, self._strata)
            row = Row(tokens_BxL1, documents_BxL1, stratum_B, strata_B, jnp.zeros(size))
            example = mixture.make_examples(objectives, row, jnp.full(size, objective), keys_B)
            example = jax.tree.map(lambda a: constrain(a, "batch", None), example)
            _, counted, stats = example_loss(
                transformer.bind(config.model, params), example, config.loss.chunk_size
            )
            # Position i and its target are in one document, whatever the objective.
            bytes_BxL = scale_BxL1[:, :-1] * token_bytes_V[example.targets_L]
            bytes_ = (example.loss_denominator_L * bytes_BxL).sum()
            return stats.nll_B.sum(), counted, bytes_

        self._score = jax.jit(score, out_shardings=replicated(mesh))

    def __call__(
        self,
        params: dict,
        names: Sequence[str] | None = None,
        every: int = 1,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Metrics `valid/<objective>/loss` (nats a token) and `valid/<objective>/bits_per_byte`.

        Args:
          params: parameters.
          names: of the objectives to score; None: all this was made for.
          every: only every so manieth batch is scored. The rows of each come from all over the text.
          stop: asked before every batch; once it returns True scoring ends, and None is returned.
        """
        metrics = {}
        for name in self._names if names is None else names:
            index = self._names.index(name)
            parts = []
            for batch in self._batches[::every]:
                if stop():
                    return None
                parts.append(self._score(params, *batch, jnp.int32(index)))
                jax.block_until_ready(parts[-_AHEAD:][0])
            nats, counted, bytes_ = np.array(jax.device_get(parts), np.float64).sum(0)
            metrics[f"valid/{name}/loss"] = float(nats / max(counted, 1))
            metrics[f"valid/{name}/bits_per_byte"] = float(nats / math.log(2) / max(bytes_, 1))
        return metrics


def _batches(rows: tuple[np.ndarray, np.ndarray, np.ndarray], size: int, pad: int):
    """Batches of `size` rows and the rows' numbers. Of n batches each takes every n-th row, so that each is a
    sample of the whole; the end is filled up with empty rows."""
    missing = -len(rows[0]) % size
    fill = (pad, PAD_DOCUMENT, 1)
    arrays = [
        np.pad(a, [(0, missing), (0, 0)], constant_values=value) for a, value in zip(rows, fill, strict=True)
    ]
    numbers_V, batches = np.arange(len(arrays[0]), dtype=np.int32), len(arrays[0]) // size
    for first in range(batches):
        part = slice(first, None, batches)
        yield *(a[part] for a in arrays), numbers_V[part]
