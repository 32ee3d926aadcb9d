"""Weights of the rows of a batch in its loss, for objectives with a weight and for pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dualsm.objectives.pairs import Entry, members_of


class RowWeights(NamedTuple):
    """Factors on each row's part of the loss, float32 [B]; None stands for ones.

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

    with the sums of each member's losses, z-loss included, over the pair's rows of the batch. Its denominator
    in the loss of the batch is that of the first member, because both members have the same sequences.

    Args:
      entries: entries of the mixture, whose members `objective_B` refers to.

    Returns:
      A function (objective_B, loss_denominator_BxL) -> weights.
    """
    members = members_of(entries)
    weight_J = jnp.array([member.weight for member in members], jnp.float32)
    # Of each member: index of the member whose denominator counts.
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
