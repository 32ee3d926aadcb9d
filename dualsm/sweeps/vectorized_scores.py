"""Held-out losses of several runs of one shape at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dualsm.data.batches import PAD_DOCUMENT
from dualsm.objectives.example import SpecialIds
from dualsm.training.step import AveragedTrainState, TrainState
from dualsm.training.valid_rows import ValidRows, valid_batches
from dualsm.training.validation import make_score_function

_AT_ONCE = 8  # runs that are scored together
_PARTS = 4  # of a split; the learning curve scores the first one


class HeldOutScores:
    """Scores the held-out rows of several splits with one compiled function.

    K is the number of runs and O that of the scored objectives.
    """

    def __init__(
        self, config: ConfigDict, special: SpecialIds, splits: Mapping[str, ValidRows], scored: Sequence[str]
    ):
        """
        Args:
          config: complete config of any of the runs.
          special: the tokenizer's special ids.
          splits: name -> held-out rows.
          scored: objectives.
        """
        self._base, self._special, self._scored = config, special, list(scored)
        self._batches = self._parts_of(splits)
        self._token_bytes = {name: jnp.asarray(rows.token_bytes_V) for name, rows in splits.items()}
        self._sums = jax.jit(self._sums_of_runs)

    def curve_losses(self, split: str, params_K: dict, slots: Sequence[int]) -> list[list[float]]:
        """Returns the losses of each scored objective on the first part of a split, for some of the slots."""
        sums_KxOx3 = self._score(split, params_K, slots, parts=1)
        return (sums_KxOx3[..., 0] / sums_KxOx3[..., 1]).tolist()

    def final_metrics(
        self, state_K: TrainState | AveragedTrainState, slots: Sequence[int]
    ) -> list[dict[str, float]]:
        """Returns the held-out metrics of the runs in some of the slots."""
        results: list[dict[str, float]] = [{} for _ in slots]
        for prefix, params_K in (("", state_K.params), ("ema/", getattr(state_K, "ema", None))):
            for split in self._batches if params_K is not None else ():
                sums_KxOx3 = self._score(split, params_K, slots, _PARTS)
                for result, sums_Ox3 in zip(results, sums_KxOx3.tolist(), strict=True):
                    for name, (nats, denominator, size) in zip(self._scored, sums_Ox3, strict=True):
                        result[f"{prefix}{split}/{name}/loss"] = nats / denominator
                        result[f"{prefix}{split}/{name}/bits_per_byte"] = nats / math.log(2) / size
        return results

    def _score(self, split: str, params_K: dict, slots: Sequence[int], parts: int) -> np.ndarray:
        """Returns the sums of `make_score_function` of each objective for some of the slots, [K, O, 3]."""
        found = []
        for first in range(0, len(slots), _AT_ONCE):
            index = np.array(slots[first : first + _AT_ONCE])
            params = _take(params_K, np.resize(index, _AT_ONCE))
            sums = [
                self._sums(params, self._token_bytes[split], batches)
                for batches in self._batches[split][:parts]
            ]
            found.append(np.asarray(jax.device_get(sums), np.float64).sum(0)[: len(index)])
        return np.concatenate(found) if found else np.zeros((0, len(self._scored), 3))

    def _sums_of_runs(self, params_K: dict, token_bytes_V: jax.Array, batches) -> jax.Array:
        score = make_score_function(self._base, self._scored, self._special)

        def of_batch(batch):
            def of_run(params):
                return jax.lax.map(
                    lambda index: jnp.stack(score(params, token_bytes_V, batch, index)),
                    jnp.arange(len(self._scored)),
                )

            return jax.vmap(of_run)(params_K)

        return jax.lax.map(of_batch, batches).sum(0)

    def _parts_of(self, splits: Mapping[str, ValidRows]) -> dict[str, list[list[jax.Array]]]:
        """Returns the batches of each split in `_PARTS` parts; all parts have one shape."""
        size, pad = self._base.batch_size, self._special.pad
        stacked = {
            name: [np.stack(arrays) for arrays in zip(*valid_batches(rows, size, pad), strict=True)]
            for name, rows in splits.items()
        }
        batches = -(-max(len(arrays[0]) for arrays in stacked.values()) // _PARTS) * _PARTS
        fill = (pad, PAD_DOCUMENT, 1, 0, 1)  # batches without text
        return {
            name: [
                [
                    jnp.asarray(
                        np.concatenate([a, np.full_like(a, value, shape=(batches - len(a), *a.shape[1:]))])[
                            i::_PARTS
                        ]
                    )
                    for a, value in zip(arrays, fill, strict=True)
                ]
                for i in range(_PARTS)
            ]
            for name, arrays in stacked.items()
        }


def _take(tree, index_K: np.ndarray):
    """Returns the entries `index_K` of the first axis of each leaf."""
    return jax.tree.map(lambda leaf: leaf[index_K], tree)
