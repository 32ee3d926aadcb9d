"""Validation: the held-out loss of each objective, with the same rows and corruption in every run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dualsm.devices.sharding import constrain, replicated, shard_batch
from dualsm.model import transformer
from dualsm.objectives import mixture
from dualsm.objectives.example import Row, SpecialIds
from dualsm.objectives.pairs import bind_members, entry, members_of
from dualsm.objectives.registry import valid_options
from dualsm.training.objective_loss import position_losses
from dualsm.training.valid_rows import ValidRows, valid_batches

_SEED = 20251214  # of the corruption; independent of the run's seed, so that runs are comparable
# Maximum number of dispatched batches: enough to keep devices busy. Above 32, XLA's CPU client can deadlock,
# because the threads that launch programs wait for a slot that only a blocked program would free.
MAX_IN_FLIGHT = 4


class PositionScores(NamedTuple):
    """Terms of the held-out loss at each position of a batch, float32 [B, L].

    Attributes:
      nats_BxL: weighted negative log-likelihood.
      weights_BxL: loss weight.
      denominator_BxL: contribution to the loss denominator.
      bytes_BxL: bytes of the target, times its contribution to the loss denominator.
    """

    nats_BxL: jax.Array
    weights_BxL: jax.Array
    denominator_BxL: jax.Array
    bytes_BxL: jax.Array


def make_position_scores(
    config: ml_collections.ConfigDict, names: Sequence[str], special: SpecialIds
) -> Callable[..., PositionScores]:
    """Returns the function that scores each position of a batch of held-out rows under one objective.

    Args:
      config: the run's config.
      names: objectives.
      special: the tokenizer's special ids.

    Returns:
      A function (params, `ValidRows.token_bytes_V`, batch of `valid_batches`, index into `names`) -> scores.
    """
    options = {"objectives": valid_options(config.objectives)}
    objectives = bind_members(members_of([entry(name, options) for name in names]), special)

    def score(
        params: dict, token_bytes_V: jax.Array, batch: Sequence[jax.Array], objective: jax.Array
    ) -> PositionScores:
        tokens_BxL1, documents_BxL1, scale_BxL1, stratum_B, strata_B = batch
        size = tokens_BxL1.shape[0]
        keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(_SEED), i))(stratum_B)
        row = Row(tokens_BxL1, documents_BxL1, stratum_B, strata_B, jnp.zeros(size))
        example = mixture.make_examples(objectives, row, jnp.full(size, objective), keys_B)
        example = jax.tree.map(lambda a: constrain(a, "batch", None), example)
        nats_BxL = position_losses(transformer.bind(config.model, params), example, config.loss.chunk_size)
        # Under every objective, position i and its target are in the same document.
        bytes_BxL = scale_BxL1[:, :-1] * token_bytes_V[example.targets_L]
        denominator_BxL = example.loss_denominator_L
        return PositionScores(nats_BxL, example.weights_L, denominator_BxL, denominator_BxL * bytes_BxL)

    return score


def make_score_function(
    config: ml_collections.ConfigDict, names: Sequence[str], special: SpecialIds
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns the function that scores a batch of held-out rows under one objective.

    Args:
      config, names, special: see `make_position_scores`.

    Returns:
      A function with the arguments of that of `make_position_scores` -> sums over the batch: loss in nats,
      loss denominator, bytes of the scored targets.
    """
    score = make_position_scores(config, names, special)

    def sums(*arguments) -> tuple[jax.Array, jax.Array, jax.Array]:
        found = score(*arguments)
        return found.nats_BxL.sum(1).sum(), found.denominator_BxL.sum(1).sum(), found.bytes_BxL.sum()

    return sums


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
    ):
        """
        Args:
          config: the run's config.
          names: objectives to score.
          special: the tokenizer's special ids.
          rows: from `valid_rows`.
          mesh: device mesh; each batch is sharded over its devices.
        """
        self.names = list(names)
        batch_size = config.batch_size // config.gradient_accumulation_steps
        self._batches = [
            tuple(shard_batch(mesh, part) for part in batch)
            for batch in valid_batches(rows, batch_size, special.pad)
        ]
        self._token_bytes_V = jnp.asarray(rows.token_bytes_V)
        self._score = jax.jit(make_score_function(config, names, special), out_shardings=replicated(mesh))

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
            parts.append(self._score(params, self._token_bytes_V, batch, jnp.int32(index)))
            jax.block_until_ready(parts[-MAX_IN_FLIGHT:][0])
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
