"""Held-out loss of every objective, on the same rows with the same corruption in every run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dualsm.data.corpus import Documents
from dualsm.data.order import RowOrder
from dualsm.data.pipeline import PAD_DOCUMENT, read_rows
from dualsm.model import transformer
from dualsm.objectives import mixture
from dualsm.objectives.example import Row, SpecialIds
from dualsm.objectives.loss import example_loss
from dualsm.objectives.options import valid_options
from dualsm.sharding import constrain, place_rows, replicated

_SEED = 20251214  # of the corruption; never the run's seed, so that runs are compared on the same task
# Batches on their way at once: enough to keep devices busy. With over 32 XLA's CPU devices can stand still
# and end the process: the threads that start programs wait for a place, and what would make one gets none.
_AHEAD = 4


def valid_rows(documents: Documents, row_tokens: int, rows: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """The held-out documents packed into rows, in their order.

    Args:
      documents: the held-out split.
      row_tokens: L.
      rows: at most this many rows; 0 takes all.
      pad: fills the last row.

    Returns:
      tokens_VxL1 and documents_VxL1, int32.
    """
    order = RowOrder(documents.lengths_N, documents.tokens, row_tokens)
    row_V = np.arange(min(order.rows, rows) if rows else order.rows)
    return read_rows(documents, order, row_V, row_tokens, pad)


class Validation:
    """Scores parameters on fixed held-out rows under several objectives, all by one compiled function."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        names: Sequence[str],
        special: SpecialIds,
        rows: tuple[np.ndarray, np.ndarray],
        token_bytes_V: np.ndarray,
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
          token_bytes_V: bytes of text that each token stands for.
          mesh: whose devices share the rows.
          samples: how often each row is scored, with other corruption each time.
          at_once: rows scored at once, over all devices; None: as many as in a microbatch of training.
        """
        self._names = list(names)
        rows = tuple(np.tile(a, (samples, 1)) for a in rows)
        at_once = at_once or config.batch_rows // config.microbatches
        self._batches = [
            tuple(place_rows(mesh, part) for part in batch) for batch in _batches(rows, at_once, special.pad)
        ]
        self._strata = len(rows[0])
        objectives = mixture.bind(names, valid_options(config.objectives), special)
        token_bytes_V = jnp.asarray(token_bytes_V, jnp.float32)

        def score(params: dict, tokens_BxL1, documents_BxL1, stratum_B, objective: jax.Array):
            """Sums over a batch: nats, counted positions, and bytes of the counted targets."""
            size = tokens_BxL1.shape[0]
            keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(_SEED), i))(stratum_B)
            strata_B = jnp.full(size, self._strata)
            row = Row(tokens_BxL1, documents_BxL1, stratum_B, strata_B, jnp.zeros(size))
            example = mixture.rewrite(objectives, row, jnp.full(size, objective), keys_B)
            example = jax.tree.map(lambda a: constrain(a, "batch", None), example)
            _, counted, stats = example_loss(
                transformer.bind(config.model, params), example, config.loss.chunk
            )
            bytes_ = (example.counted_L * token_bytes_V[example.targets_L]).sum()
            return stats.nll_B.sum(), counted, bytes_

        self._score = jax.jit(score, out_shardings=replicated(mesh))

    def __call__(self, params: dict, names: Sequence[str] | None = None, every: int = 1) -> dict[str, float]:
        """Metrics `valid/<objective>/loss` (nats a token) and `valid/<objective>/bits_per_byte`.

        Args:
          params: parameters.
          names: of the objectives to score; None: all this was made for.
          every: only every so manieth batch is scored. The rows of each come from all over the text.
        """
        metrics = {}
        for name in self._names if names is None else names:
            index = self._names.index(name)
            parts = []
            for batch in self._batches[::every]:
                parts.append(self._score(params, *batch, jnp.int32(index)))
                jax.block_until_ready(parts[-_AHEAD:][0])
            nats, counted, bytes_ = np.array(jax.device_get(parts), np.float64).sum(0)
            metrics[f"valid/{name}/loss"] = float(nats / max(counted, 1))
            metrics[f"valid/{name}/bits_per_byte"] = float(nats / math.log(2) / max(bytes_, 1))
        return metrics


def _batches(rows: tuple[np.ndarray, np.ndarray], size: int, pad: int):
    """Batches of `size` rows and the rows' numbers. Of n batches each takes every n-th row, so that each is a
    sample of the whole; the end is filled up with empty rows."""
    tokens_VxL1, documents_VxL1 = rows
    missing = -len(tokens_VxL1) % size
    tokens_VxL1 = np.pad(tokens_VxL1, [(0, missing), (0, 0)], constant_values=pad)
    documents_VxL1 = np.pad(documents_VxL1, [(0, missing), (0, 0)], constant_values=PAD_DOCUMENT)
    numbers_V, batches = np.arange(len(tokens_VxL1), dtype=np.int32), len(tokens_VxL1) // size
    for first in range(batches):
        part = slice(first, None, batches)
        yield tokens_VxL1[part], documents_VxL1[part], numbers_V[part]
