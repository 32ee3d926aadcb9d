"""The loss, which is the same function for all objectives."""

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
    """Sums over the positions of each row.

    Attributes:
      nll_B: float32; sum of the weighted negative log-likelihoods, in nats.
      loss_denominator_B: float32; sum of the loss denominators.
    """

    nll_B: jax.Array
    loss_denominator_B: jax.Array


def example_loss(
    model: transformer.Transformer,
    example: Example,
    chunk: int,
    z_loss: float = 0.0,
    row_weights_B: jax.Array | float = 1.0,
    z_loss_weights_B: jax.Array | None = None,
    dropout_keys_Bx2: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, RowSums]:
    """Returns the summed loss of a batch of examples and the loss denominator.

    The sum is not divided by the denominator, so that sums over parts of a batch can be added exactly.

    Args:
      model: the model.
      example: examples; the fields have the shape [B, L].
      chunk: positions per row whose logits are in memory together.
      z_loss: weight of the squared log normalizer at every position with a loss.
      row_weights_B: factor on the loss of each row, but not on its denominator or z-loss.
      z_loss_weights_B: factor on the z-loss of each row; None: 1.
      dropout_keys_Bx2: see `Transformer.features`.

    Returns:
      weighted_sum: float32 []; sum of the weighted losses, to be differentiated.
      weight_sum: float32 []; loss denominator of the batch.
      stats: sums per row, without `row_weights_B` and z-loss.
    """
    row_weights_Bx1 = jnp.broadcast_to(row_weights_B, example.weights_L.shape[:1])[:, None]
    has_loss = (example.weights_L > 0).astype(jnp.float32)
    if z_loss_weights_B is not None:
        has_loss = has_loss * z_loss_weights_B[:, None]
    weighted_sum, nll_BxL = cross_entropy(
        model.features(example.inputs_L, example.key_start_L, example.key_end_L, dropout_keys_Bx2),
        model.head.output.kernel[...],
        model.output_bias(),
        example.targets_L,
        example.weights_L * row_weights_Bx1,
        z_loss * has_loss,
        chunk,
    )
    stats = RowSums((example.weights_L * nll_BxL).sum(1), example.loss_denominator_L.sum(1))
    return weighted_sum, stats.loss_denominator_B.sum(), stats


def position_losses(model: transformer.Transformer, example: Example, chunk: int) -> jax.Array:
    """Returns the weighted negative log-likelihood at each position of a batch, in nats, float32 [B, L].

    Args:
      model: the model.
      example: examples; the fields have the shape [B, L].
      chunk: positions per row whose logits are in memory together.
    """
    _, nll_BxL = cross_entropy(
        model.features(example.inputs_L, example.key_start_L, example.key_end_L),
        model.head.output.kernel[...],
        model.output_bias(),
        example.targets_L,
        example.weights_L,
        jnp.zeros_like(example.weights_L),
        chunk,
    )
    return example.weights_L * nll_BxL


def objective_loss(
    name: str,
    config: ml_collections.ConfigDict,
    special: SpecialIds,
    options: Mapping = {},  # noqa: B006 (never written to)
    chunk: int = 1024,
) -> Callable[[dict, Row, jax.Array], tuple[jax.Array, jax.Array, RowSums]]:
    """Returns the loss of a single objective as a pure function, which can be jitted and differentiated.

    Args:
      name: name of the objective.
      config: `config.model`.
      special: the tokenizer's special ids.
      options: keyword arguments of the objective.
      chunk: positions per row whose logits are in memory together.

    Returns:
      A function (params, rows, key) -> (weighted_sum, weight_sum, stats). The loss in nats per token is
      weighted_sum / weight_sum.
    """

    def loss(params: dict, rows: Row, key: jax.Array):
        keys_B = row_keys(key, rows.tokens_L1.shape[0])
        make_examples = jax.vmap(lambda row, row_key: OBJECTIVES[name](row, row_key, special, **options))
        return example_loss(transformer.bind(config, params), make_examples(rows, keys_B), chunk)

    return loss
