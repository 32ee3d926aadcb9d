"""The mixture: assigns an objective to each row of each step, and makes the examples.

The host assigns objectives from the shares alone, so that a change of the shares never recompiles the
train step. On the device, one vmapped `switch` makes the examples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dualsm.objectives.example import Example, Row
from dualsm.objectives.registry import OBJECTIVES
from dualsm.process.errors import UserError


def check_shares(
    shares: Mapping[str, float], pairs: Sequence[str] = (), where: str = "config.mixture"
) -> None:
    """Raises `UserError` unless the shares are a probability distribution over objectives and `pairs`."""
    for name, share in shares.items():
        if name not in OBJECTIVES and name not in pairs:
            known = ", ".join([*OBJECTIVES, *pairs])
            raise UserError(f"{where}.{name}: unknown objective or pair; choose from {known}")
        if not 0 <= share <= 1:
            raise UserError(f"{where}.{name}={share:g} must be in [0, 1]")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        listed = ", ".join(f"{name}={share:g}" for name, share in shares.items() if share)
        raise UserError(
            f"{where} sums to {total:g} ({listed or 'all shares are 0'}); the shares must sum to 1"
        )


def sequence_counts(
    shares_SxE: np.ndarray, batch_size: int | np.ndarray, rows_E: Sequence[int] | None = None
) -> np.ndarray:
    """Returns the number of sequences of each entry at each step, by error diffusion.

    Rounding errors carry over to the next step, and each step rounds by largest remainder. After any number
    of steps, with constant shares or any schedule, each of E entries is less than one row ahead of its exact
    share, and at most 1/2 + 1/3 + ... + 1/E rows behind it: less than one row for up to three entries, less
    than two for up to ten. An entry that is ahead cannot return rows, so several of them with small shares
    can make another entry wait. If every share is at least one row per step, no entry is ahead by more than
    its next share, and each entry is less than one row away. Pairs at most double the distances and add one
    row.

    Args:
      shares_SxE: share of each entry of the rows of each step; sums to 1 at each step.
      batch_size: rows of each step, B or int [S]; must be even if there are pairs.
      rows_E: rows per sequence of each entry, 1 or 2; None: 1.

    Returns:
      int64 [S, E]; the counts times `rows_E` sum to the rows of each step.
    """
    counts_SxE = np.empty(shares_SxE.shape, np.int64)
    entries = range(shares_SxE.shape[1])
    rows_E = [1] * len(entries) if rows_E is None else list(rows_E)
    rows_S = np.broadcast_to(batch_size, len(shares_SxE)).tolist()
    owed = [0.0 for _ in entries]
    for step, (rows, shares) in enumerate(zip(rows_S, shares_SxE.tolist(), strict=True)):
        due = [o + rows * share for o, share in zip(owed, shares, strict=True)]
        paid = [max(int(d / size), 0) for d, size in zip(due, rows_E, strict=True)]
        short = rows - sum(n * size for n, size in zip(paid, rows_E, strict=True))
        # In sequences; rounded, so that floating-point errors do not break exact ties.
        rest = [round(d / size - n, 6) for d, n, size in zip(due, paid, rows_E, strict=True)]
        while short:
            if short > 0:  # the sequence of a pair may be one row too many
                e, sign = max(entries, key=lambda e: rest[e]), 1
            else:
                payable = [e for e in entries if paid[e] and rows_E[e] <= -short]
                e, sign = min(payable, key=lambda e: rest[e]), -1
            paid[e] += sign
            rest[e] -= sign
            short -= sign * rows_E[e]
        owed = [d - n * size for d, n, size in zip(due, paid, rows_E, strict=True)]
        counts_SxE[step] = paid
    return counts_SxE


def assign(
    counts_E: np.ndarray, rows_E: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spreads the entries of a step evenly over the batch, so that any slice has about the same mixture.

    The two rows of a pair's sequence are next to each other.

    Args:
      counts_E: number of sequences of each entry.
      rows_E: rows per sequence of each entry, 1 or 2; None: 1.

    Returns:
      objective_B, stratum_B, strata_B, int32: index of each row's member among those of all entries;
      `Row.stratum`; `Row.strata`.
    """
    entry_I, stratum_I = sequence_entries(counts_E)
    rows_E = np.ones(len(counts_E), np.int64) if rows_E is None else np.asarray(rows_E)
    sequence_B = np.repeat(np.arange(len(entry_I)), rows_E[entry_I])
    entry_B = entry_I[sequence_B]
    first_E = np.cumsum(rows_E) - rows_E
    which_B = np.arange(len(sequence_B)) - np.searchsorted(sequence_B, sequence_B)
    rows = (first_E[entry_B] + which_B, stratum_I[sequence_B], counts_E[entry_B])
    return tuple(a.astype(np.int32) for a in rows)


def row_sequences(counts_E: np.ndarray, rows_E: Sequence[int]) -> np.ndarray:
    """Returns the index of each row's sequence among the sequences of its step, int64 [B]; see `assign`."""
    entry_I, _ = sequence_entries(counts_E)
    return np.repeat(np.arange(len(entry_I)), np.asarray(rows_E)[entry_I])


def sequence_entries(counts_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the entry of each of the I sequences of a step, and its index among those of the entry."""
    entry_I = np.repeat(np.arange(len(counts_E)), counts_E)
    stratum_I = np.concatenate([np.arange(count) for count in counts_E])
    order_I = np.argsort((stratum_I + 0.5) / counts_E[entry_I], kind="stable")
    return entry_I[order_I], stratum_I[order_I]


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


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """Returns one key per row; the key of a row does not depend on the number of rows."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
