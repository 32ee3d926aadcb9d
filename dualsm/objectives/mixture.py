"""The mixture: which row of which step follows which objective, and one program that serves them all.

The assignment is made on the host from the shares alone, so that changing shares never recompiles
anything; the rewriting of the rows is one vmapped `switch` on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dualsm.objectives.ahead import diverse_causal, next_all
from dualsm.objectives.causal import causal, masked_input_causal
from dualsm.objectives.example import Example, Row, SpecialIds
from dualsm.objectives.masked import masked, variable_length_masked
from dualsm.objectives.masked_diffusion import masked_diffusion
from dualsm.objectives.prefix import prefix
from dualsm.objectives.span_denoising import span_denoising
from dualsm.process.errors import UserError

OBJECTIVES: dict[str, Callable[..., Example]] = {
    "causal": causal,
    "prefix": prefix,
    "masked_diffusion": masked_diffusion,
    "masked": masked,
    "variable_length_masked": variable_length_masked,
    "diverse_causal": diverse_causal,
    "masked_input_causal": masked_input_causal,
    "span_denoising": span_denoising,
    "next_all": next_all,
}


def check_shares(shares: Mapping[str, float]) -> None:
    """Raises `UserError` unless the shares are a distribution over known objectives."""
    for name, share in shares.items():
        if name not in OBJECTIVES:
            raise UserError(f"config.mixture.{name} is no objective; there are {', '.join(OBJECTIVES)}")
        if not 0 <= share <= 1:
            raise UserError(f"config.mixture.{name}={share:g} must lie in [0, 1]")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        listed = ", ".join(f"{name}={share:g}" for name, share in shares.items() if share)
        raise UserError(f"config.mixture sums to {total:g}, not 1 ({listed or 'all shares are 0'})")


def sequence_counts(shares_SxJ: np.ndarray, batch_size: int) -> np.ndarray:
    """How many rows of each step follow each objective, by error diffusion.

    What an objective is owed after a step is carried to the next; each step pays whole rows and rounds by
    largest remainder. After any number of steps each objective is less than one row from its exact share
    (with two objectives at most half a row).

    Args:
      shares_SxJ: share of each objective at each step; each step's sum to 1.
      batch_size: rows a step, B.

    Returns:
      int64 [S, J]; each step's sum to B.
    """
    counts_SxJ = np.empty(shares_SxJ.shape, np.int64)
    objectives = range(shares_SxJ.shape[1])
    owed = [0.0 for _ in objectives]
    for step, shares in enumerate(shares_SxJ.tolist()):
        due = [o + batch_size * share for o, share in zip(owed, shares, strict=True)]
        paid = [max(int(d), 0) for d in due]
        short = batch_size - sum(paid)
        # Rounded, so that what float sums do to exact ties does not decide them.
        rest = [round(d - p, 6) for d, p in zip(due, paid, strict=True)]
        for j in sorted(objectives, key=lambda j: -rest[j])[: max(short, 0)]:
            paid[j] += 1
        for j in sorted((j for j in objectives if paid[j]), key=lambda j: rest[j])[: max(-short, 0)]:
            paid[j] -= 1
        owed = [d - p for d, p in zip(due, paid, strict=True)]
        counts_SxJ[step] = paid
    return counts_SxJ


def assign(counts_J: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spreads a step's counts evenly over its rows, so that any part of the batch has about the mixture.

    Returns:
      objective_B, stratum_B, strata_B, int32: the objective of each row, its number among the rows of
      that objective, and how many those are.
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
    """Turns each row into an example of its objective.

    Args:
      objectives: functions from (row, key) to an example.
      rows: B packed rows.
      objective_B: index into `objectives` for each row.
      keys_B: a PRNG key for each row.

    Returns:
      An `Example` whose fields have the shape [B, L].
    """
    return jax.vmap(lambda row, index, key: jax.lax.switch(index, objectives, row, key))(
        rows, objective_B, keys_B
    )


def bind(
    names: Sequence[str], options: Mapping, special: SpecialIds
) -> list[Callable[[Row, jax.Array], Example]]:
    """The named objectives as functions of (row, key), with their options from the config filled in.

    Args:
      names: of objectives.
      options: name -> keyword arguments of the objective; `weight` belongs to the step and is left out.
      special: the tokenizer's special ids.
    """
    bound = []
    for name in names:
        keywords = {key: value for key, value in options[name].items() if key != "weight"}
        bound.append(functools.partial(OBJECTIVES[name], special=special, **keywords))
    return bound


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """One key a row; row b's does not depend on how many rows there are."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
