"""The plan of a run: entry, objective and sequence of every row of every step."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from dualsm.objectives import mixture
from dualsm.objectives.pairs import members_of
from dualsm.objectives.shares import step_shares, trained_entries


class MixturePlan:
    """Assigns entries and sequences to the rows of each step; a function of the config alone.

    Attributes:
      entries: trained entries of the mixture.
      members: members of all entries; `Batch.objective_B` refers to them.
      shares_SxE: share of each entry of the rows of each step.
      num_sequences: number of sequences of the run. The two rows of a pair's sequence count once.
    """

    def __init__(self, config: ConfigDict):
        self.entries = trained_entries(config)
        self.members = members_of(self.entries)
        self.shares_SxE = step_shares(config, [entry.name for entry in self.entries])
        self._rows_E = [entry.rows for entry in self.entries]
        self._counts_SxE = mixture.sequence_counts(self.shares_SxE, config.batch_size, self._rows_E)
        self._totals_S1xE = np.concatenate([[[0] * len(self.entries)], self._counts_SxE.cumsum(0)])
        self.num_sequences = self.sequences(config.steps)

    def sequences(self, step: int) -> int:
        """Returns the number of sequences that the first `step` steps read."""
        return int(self._totals_S1xE[step].sum())

    def member_rows(self, step: int) -> np.ndarray:
        """Returns the number of rows of each member in the first `step` steps, int64 [J]."""
        return np.repeat(self._totals_S1xE[step], self._rows_E)

    def assign(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns objective_B, stratum_B and strata_B of a step; see `mixture.assign`."""
        return mixture.assign(self._counts_SxE[step], self._rows_E)

    def row_sequences(self, step: int) -> np.ndarray:
        """Returns the index of each row's sequence among the sequences of the run, int64 [B]."""
        within_step_B = mixture.row_sequences(self._counts_SxE[step], self._rows_E)
        return self.sequences(step) + within_step_B


def count_sequences(config: ConfigDict, steps: int | None = None) -> int:
    """Returns the number of sequences of the first `steps` steps of a run, or of all of them."""
    steps = config.steps if steps is None else steps
    if all(entry.rows == 1 for entry in trained_entries(config)):
        return steps * config.batch_size
    return MixturePlan(config).sequences(steps)
