"""The plan of a run: source, entry, objective and sequence of every row of every step."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from dualsm.objectives import mixture
from dualsm.objectives.pairs import members_of
from dualsm.objectives.shares import shares_by_source, trained_entries


class MixturePlan:
    """Assigns sources, entries and sequences to the rows of each step; a function of the config alone.

    The rows of a step are divided between the sources, and the rows of a source between its entries, both by
    `mixture.sequence_counts`.

    Attributes:
      sources: the run's sources; one unnamed source if there is no `config.sources`.
      entries: trained entries of the mixture, source by source.
      members: members of all entries; `Batch.objective_B` refers to them.
      member_sources: name of the source of each member.
      shares_SxE: each entry's share of the rows of each step.
      num_sequences: number of sequences of the run. The two rows of a pair's sequence count once.
    """

    def __init__(self, config: ConfigDict):
        parts = shares_by_source(config)
        # A source that trains a pair gets an even number of rows.
        rows_O = [max(entry.rows for entry in part.entries) for part in parts]
        share_SxO = np.stack([part.share_S for part in parts], 1)
        rows_SxO = mixture.sequence_counts(share_SxO, config.batch_size, rows_O) * rows_O
        counts = [
            mixture.sequence_counts(part.within_SxE, rows_S, [entry.rows for entry in part.entries])
            for part, rows_S in zip(parts, rows_SxO.T, strict=True)
        ]
        self.sources = [part.source for part in parts]
        self.entries = [entry for part in parts for entry in part.entries]
        self.members = members_of(self.entries)
        self.member_sources = [entry.source for entry in self.entries for _ in entry.members]
        self.shares_SxE = np.concatenate([part.share_SxE for part in parts], 1)
        self._rows_E = [entry.rows for entry in self.entries]
        self._source_E = np.repeat(np.arange(len(parts)), [len(part.entries) for part in parts])
        self._counts_SxE = np.concatenate(counts, 1)
        self._totals_S1xE = np.concatenate([[[0] * len(self.entries)], self._counts_SxE.cumsum(0)])
        self.num_sequences = self.sequences(config.steps)

    def sequences(self, step: int) -> int:
        """Returns the number of sequences that the first `step` steps read."""
        return int(self._totals_S1xE[step].sum())

    def source_sequences(self, step: int) -> list[int]:
        """Returns the number of sequences of each source that the first `step` steps read."""
        total_E = self._totals_S1xE[step]
        return [int(total_E[self._source_E == k].sum()) for k in range(len(self.sources))]

    def member_rows(self, step: int) -> np.ndarray:
        """Returns the number of rows of each member in the first `step` steps, int64 [J]."""
        return np.repeat(self._totals_S1xE[step], self._rows_E)

    def assign(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns objective_B, stratum_B and strata_B of a step; see `mixture.assign`."""
        return mixture.assign(self._counts_SxE[step], self._rows_E)

    def row_sources(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source and the sequence of each row of a step.

        Returns:
          source_B: index of the row's source in `sources`.
          index_B: int64; index of the row's sequence among the sequences of that source.
        """
        entry_I, _ = mixture.sequence_entries(self._counts_SxE[step])
        source_I, index_I = self._source_E[entry_I], np.empty(len(entry_I), np.int64)
        for k, first in enumerate(self.source_sequences(step)):
            mine_I = source_I == k
            index_I[mine_I] = first + np.arange(mine_I.sum())
        sequence_B = mixture.row_sequences(self._counts_SxE[step], self._rows_E)
        return source_I[sequence_B], index_I[sequence_B]


def count_sequences(config: ConfigDict, steps: int | None = None) -> int:
    """Returns the number of sequences of the first `steps` steps of a run, or of all of them."""
    steps = config.steps if steps is None else steps
    if all(entry.rows == 1 for entry in trained_entries(config)):
        return steps * config.batch_size
    return MixturePlan(config).sequences(steps)
