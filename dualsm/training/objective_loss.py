"""The one loss behind every objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from dualsm.model import transformer
from dualsm.model.cross_entropy import cross_entropy
from dualsm.objectives.example import Example, Row, SpecialIds
from dualsm.objectives.mixture import OBJECTIVES, row_keys


class RowSums(NamedTuple):
    """Per row: `nll_B`, the weighted sum of nats, and `loss_denominator_B`, its denominator."""

    nll_B: jax.Array
    loss_denominator_B: jax.Array


def example_loss(
    model: transformer.Transformer,
    example: Example,
    chunk: int,
    z_loss: float = 0.0,
    row_weights_B: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array, RowSums]:
    """Loss of a batch of examples, undivided, so that parts of a batch can be added up exactly.

    Args:
      model: the model.
      example: with fields of shape [B, L].
      chunk: positions a row whose logits are held at once.
      z_loss: weight of the squared log normaliser at every position that carries loss.
      row_weights_B: factor on each row's loss, not on its denominator.

    Returns:
      weighted_sum: float32 []; what is differentiated.
      weight_sum: float32 []; what the sum over all rows is divided by, once.
      stats: sums of each row, without factors and z-loss.
    """
    row_weights_Bx1 = jnp.broadcast_to(row_weights_B, example.weights_L.shape[:1])[:, None]
    carries = (example.weights_L > 0).astype(jnp.float32)
    weighted_sum, nll_BxL = cross_entropy(
        model.features(example.inputs_L, example.key_start_L, example.key_end_L),
        model.head.output.kernel[...],
        model.head.output.bias[...],
        example.targets_L,
        example.weights_L * row_weights_Bx1,
        z_loss * carries,
        chunk,
    )
    stats = RowSums((example.weights_L * nll_BxL).sum(1), example.loss_denominator_L.sum(1))
    return weighted_sum, stats.loss_denominator_B.sum(), stats


def objective_loss(
    name: str,
    config: ml_collections.ConfigDict,
    special: SpecialIds,
    options: Mapping = {},  # noqa: B006 (never written to)
    chunk: int = 1024,
) -> Callable[[dict, Row, jax.Array], tuple[jax.Array, jax.Array, RowSums]]:
    """An objective on its own, as a pure function `(params, rows, key)` to jit and differentiate.

    Args:
      name: of the objective.
      config: `config.model`.
      special: the tokenizer's special ids.
      options: keyword arguments of the objective.
      chunk: positions a row whose logits are held at once.

    Returns:
      A function from parameters, a batch of rows and a key to (weighted_sum, weight_sum, stats); the loss
      in nats per token is weighted_sum / weight_sum.
    """

    def loss(params: dict, rows: Row, key: jax.Array):
        keys_B = row_keys(key, rows.tokens_L1.shape[0])
        rewrite = jax.vmap(lambda row, row_key: OBJECTIVES[name](row, row_key, special, **options))
        return example_loss(transformer.bind(config, params), rewrite(rows, keys_B), chunk)

    return loss
