"""Gradients of a batch's loss, with gradient accumulation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from dualsm.devices.sharding import platform, summed_over_devices
from dualsm.model import transformer
from dualsm.objectives.example import Example
from dualsm.training.objective_loss import RowSums, example_loss
from dualsm.training.row_weights import RowWeights


class TrainingRows(NamedTuple):
    """The rows of a batch for the gradient.

    Attributes:
      example: examples of the rows.
      weights: weights of the rows in the loss.
      dropout_keys_Bx2: uint32; key of each row's dropout masks; None: no dropout.
    """

    example: Example
    weights: RowWeights
    dropout_keys_Bx2: jax.Array | None = None


# (params, rows) -> (gradients, loss sums of each row)
GradientFunction = Callable[[dict, TrainingRows], tuple[dict, RowSums]]


def make_gradient_function(config: ml_collections.ConfigDict) -> GradientFunction:
    """Returns the function that computes the gradients of a batch's summed loss.

    Args:
      config: the run's config, with `gradient_accumulation_steps` filled in.
    """
    function = jax.grad(functools.partial(_summed_loss, config), has_aux=True)
    if config.gradient_accumulation_steps > 1:
        function = functools.partial(_accumulate, function, config.gradient_accumulation_steps)

    def gradients(params: dict, rows: TrainingRows) -> tuple[dict, RowSums]:
        # Without accumulation, accelerators overlap a layer's all-reduce with the next layer's computation.
        if config.gradient_accumulation_steps == 1 and platform() != "cpu":
            return function(params, rows)
        return summed_over_devices(function)(params, rows)

    return gradients


def _summed_loss(
    config: ml_collections.ConfigDict, params: dict, rows: TrainingRows
) -> tuple[jax.Array, RowSums]:
    example, weights, dropout_keys_Bx2 = rows
    model = transformer.bind(config.model, params)
    loss, _, stats = example_loss(
        model,
        example,
        config.loss.chunk_size,
        config.loss.z_loss,
        weights.nll_B,
        weights.z_loss_B,
        dropout_keys_Bx2,
    )
    return loss, stats


def _accumulate(
    differentiate: GradientFunction, steps: int, params: dict, rows: TrainingRows
) -> tuple[dict, RowSums]:
    """Sums gradients over `steps` parts of the rows, one after the other."""

    def add(total: dict, part: TrainingRows):
        grads, stats = differentiate(params, part)
        return jax.tree.map(jnp.add, total, grads), stats

    parts = jax.tree.map(lambda a: _interleave(a, steps), rows)
    grads, stats = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    return grads, jax.tree.map(_undo_interleave, stats)


def _interleave(a_Bx: jax.Array, parts: int) -> jax.Array:
    """Reshapes [B, ...] to [parts, B / parts, ...], row b in part b % parts: rows stay on their device."""
    return jnp.moveaxis(a_Bx.reshape(-1, parts, *a_Bx.shape[1:]), 1, 0)


def _undo_interleave(a: jax.Array) -> jax.Array:
    return jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])
