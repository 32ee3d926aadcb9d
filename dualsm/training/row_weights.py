"""Weights of the rows of a batch in its loss, for objectives with a weight and for pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dualsm.objectives.pairs import Entry, members_of


class RowWeights(NamedTuple):
    """Factors on the loss of each row, float32 [B]; None: all factors are 1.

    Attributes:
      nll_B: factor on the row's weighted sum of nats.
      z_loss_B: factor on the row's z-loss.
      denominator_B: factor on the row's loss denominator.
    """

    nll_B: jax.Array
    z_loss_B: jax.Array | None = None
    denominator_B: jax.Array | None = None


def make_row_weights(entries: Sequence[Entry]) -> Callable[[jax.Array, jax.Array], RowWeights]:
    """Returns the function that computes the weights of the rows of a batch.

    An objective's weight is a factor on the nats of its rows. The loss of a pair is

        weight_1 * sum_1 / denominator_1 + weight_2 * sum_2 / denominator_2

    with sums over the pair's rows of the batch; sum_j includes the z-loss. Because both members have the same
    sequences, only the denominator of the first member enters the loss denominator of the batch.

    Args:
      entries: entries of the mixture; `objective_B` refers to their members.

    Returns:
      A function (objective_B, loss_denominator_BxL) -> weights.
    """
    members = members_of(entries)
    weight_J = jnp.array([member.weight for member in members], jnp.float32)
    # Index of each member's denominator: for a pair, that of its first member.
    first_J, first = [], 0
    for entry in entries:
        first_J += [first] * entry.rows
        first += entry.rows
    is_pair_J = jnp.array([entry.rows > 1 for entry in entries for _ in entry.members])
    is_first_J = jnp.array([index == j for j, index in enumerate(first_J)])

    def row_weights(objective_B: jax.Array, loss_denominator_BxL: jax.Array) -> RowWeights:
        if len(members) == len(entries):
            return RowWeights(weight_J[objective_B])
        objective_BxJ = jax.nn.one_hot(objective_B, len(members))
        denominator_J = (loss_denominator_BxL.sum(1)[:, None] * objective_BxJ).sum(0)
        counted_J = denominator_J[jnp.array(first_J)]
        ratio_J = jnp.where(is_first_J, 1.0, counted_J / jnp.maximum(denominator_J, 1))
        nll_J = weight_J * ratio_J
        z_loss_J = jnp.where(is_pair_J, nll_J, 1.0)
        return RowWeights(nll_J[objective_B], z_loss_J[objective_B], is_first_J[objective_B] * 1.0)

    return row_weights
