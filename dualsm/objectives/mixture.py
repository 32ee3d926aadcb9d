"""The mixture: assigns an objective to each row of each step, and makes the examples.

The host assigns objectives from the shares alone, so that a change of the shares never recompiles the
training step. On the device, one vmapped `switch` makes the examples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dualsm.objectives.example import Example, Row, SpecialIds
from dualsm.objectives.registry import OBJECTIVES
from dualsm.process.errors import UserError


def check_shares(shares: Mapping[str, float]) -> None:
    """Raises `UserError` unless the shares are a probability distribution over objectives."""
    for name, share in shares.items():
        if name not in OBJECTIVES:
            raise UserError(f"config.mixture.{name}: unknown objective; choose from {', '.join(OBJECTIVES)}")
        if not 0 <= share <= 1:
            raise UserError(f"config.mixture.{name}={share:g} must be in [0, 1]")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        listed = ", ".join(f"{name}={share:g}" for name, share in shares.items() if share)
        raise UserError(
            f"config.mixture sums to {total:g} ({listed or 'all shares are 0'}); the shares must sum to 1"
        )


def sequence_counts(shares_SxJ: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the number of rows of each objective at each step, by error diffusion.

    Rounding errors carry over to the next step, and each step rounds by largest remainder. After any number
    of steps, each objective is less than one row away from its exact share (at most half a row with two
    objectives).

    Args:
      shares_SxJ: share of each objective at each step; sums to 1 at each step.
      batch_size: rows per step, B.

    Returns:
      int64 [S, J]; sums to B at each step.
    """
    counts_SxJ = np.empty(shares_SxJ.shape, np.int64)
    objectives = range(shares_SxJ.shape[1])
    owed = [0.0 for _ in objectives]
    for step, shares in enumerate(shares_SxJ.tolist()):
        due = [o + batch_size * share for o, share in zip(owed, shares, strict=True)]
        paid = [max(int(d), 0) for d in due]
        short = batch_size - sum(paid)
        # Rounded, so that floating-point errors do not break exact ties.
        rest = [round(d - p, 6) for d, p in zip(due, paid, strict=True)]
        for j in sorted(objectives, key=lambda j: -rest[j])[: max(short, 0)]:
            paid[j] += 1
        for j in sorted((j for j in objectives if paid[j]), key=lambda j: rest[j])[: max(-short, 0)]:
            paid[j] -= 1
        owed = [d - p for d, p in zip(due, paid, strict=True)]
        counts_SxJ[step] = paid
    return counts_SxJ


def assign(counts_J: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spreads the objectives of a step evenly over the batch, so that any slice has about the same mixture.

    Args:
      counts_J: number of rows of each objective; sums to B.

    Returns:
      objective_B, stratum_B, strata_B, int32: index of each row's objective; `Row.stratum`; `Row.strata`.
    """
    objective_B = np.repeat(np.arange(len(counts_J)), counts_J)
    stratum_B = np.concatenate([np.arange(count) for count in counts_J])
    strata_B = counts_J[objective_B]
    order_B = np.argsort((stratum_B + 0.5) / strata_B, kind="stable")
    return tuple(a[order_B].astype(np.int32) for a in (objective_B, stratum_B, strata_B))


def make_examples(
    objectives: Sequence[Callable[[Row, jax.Array], Example]],
    rows: Row,
    objective_B: jax.Array,
    keys_B: jax.Array,
) -> Example:
    """Makes the example of each row by the objective of the row.

    Args:
      objectives: functions from (row, key) to an example.
      rows: B packed rows.
      objective_B: index into `objectives` of each row.
      keys_B: one PRNG key per row.

    Returns:
      An `Example` with fields of shape [B, L].
    """
    return jax.vmap(lambda row, index, key: jax.lax.switch(index, objectives, row, key))(
        rows, objective_B, keys_B
    )


def bind(
    names: Sequence[str], options: Mapping, special: SpecialIds
) -> list[Callable[[Row, jax.Array], Example]]:
    """Returns the named objectives as functions of (row, key), with their options bound.

    Args:
      names: names of objectives.
      options: `config.objectives`, or a part of it; `weight` is ignored, the training step applies it.
      special: special ids of the tokenizer.
    """
    bound = []
    for name in names:
        keywords = {key: value for key, value in options[name].items() if key != "weight"}
        bound.append(functools.partial(OBJECTIVES[name], special=special, **keywords))
    return bound


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """Returns one key per row; the key of a row does not depend on the number of rows."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
