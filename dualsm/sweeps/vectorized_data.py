"""The batches and plans of many runs, as arrays that fit on one device."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dualsm.data.batches import BatchSource
from dualsm.objectives.plan import MixturePlan
from dualsm.objectives.shares import trained_entries
from dualsm.training.run_corpora import open_corpora, order_documents
from dualsm.training.step import Batch


class DeviceData(NamedTuple):
    """The S steps of all runs, one run after the other; runs with the same batches or plan share them.

    Attributes:
      tokens_SxBxL1: uint16 or int32; see `Row`.
      documents_SxBxL1: int16; see `Row`.
      plan_SxBx3: int32; objective, stratum and strata of each row; see `Batch`.
    """

    tokens_SxBxL1: jax.Array
    documents_SxBxL1: jax.Array
    plan_SxBx3: jax.Array

    def batch(self, step: jax.Array, plan_step: jax.Array) -> Batch:
        """Returns the batch at an index of the steps and an index of the plans."""
        tokens, documents = (a[step].astype(jnp.int32) for a in self[:2])
        return Batch(tokens, documents, *jnp.moveaxis(self.plan_SxBx3[plan_step], -1, 0))


class FirstSteps(NamedTuple):
    """Index in `DeviceData` of each run's first batch and of the first step of its plan, by name."""

    batch: dict[str, int]
    plan: dict[str, int]


def load_data(
    configs: Mapping[str, ConfigDict], members: Sequence[str], processes: int = 1, capacity: int = 0
) -> tuple[DeviceData, FirstSteps]:
    """Reads the batches of all runs.

    Args:
      configs: name of a run -> its complete config.
      members: names of the members of the mixture, which the plan refers to.
      processes: number of processes that read.
      capacity: the arrays are padded to this number of steps, so that programs for several sets of runs have
        the same shapes and are compiled once.
    """
    batch_keys = {name: _batch_key(config) for name, config in configs.items()}
    plan_keys = {name: _plan_key(config) for name, config in configs.items()}
    of_batch_key = {key: configs[name] for name, key in batch_keys.items()}
    of_plan_key = {key: configs[name] for name, key in plan_keys.items()}
    plans = [read_plan(config, members) for config in of_plan_key.values()]
    if processes > 1:
        context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads can deadlock
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
            batches = list(pool.map(read_run, of_batch_key.values()))
    else:
        batches = [read_run(config) for config in of_batch_key.values()]
    first_batch = dict(zip(of_batch_key, _starts(len(tokens) for tokens, _ in batches), strict=True))
    first_plan = dict(zip(of_plan_key, _starts(map(len, plans)), strict=True))
    data = DeviceData(
        _join([tokens for tokens, _ in batches], capacity),
        _join([documents for _, documents in batches], capacity),
        _join(plans, capacity),
    )
    return data, FirstSteps(
        {name: first_batch[key] for name, key in batch_keys.items()},
        {name: first_plan[key] for name, key in plan_keys.items()},
    )


def read_run(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens and documents of all batches of a run, [S, B, L + 1]."""
    corpora, plan = open_corpora(config), MixturePlan(config)
    source = BatchSource(
        corpora=order_documents(config, corpora, plan),
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        pad=corpora[0].corpus.tokenizer().special.pad,
        local_rows=range(config.batch_size),
        steps=config.steps,
        row_sources=plan.row_sources,
    )
    shape = (config.steps, config.batch_size, config.seq_len + 1)
    tokens_SxBxL1 = np.empty(shape, np.uint16 if config.model.vocab_size <= 2**16 else np.int32)
    documents_SxBxL1 = np.empty(shape, np.int16)
    for step in range(config.steps):
        element = source[step]
        tokens_SxBxL1[step], documents_SxBxL1[step] = element["tokens"], element["documents"]
    return tokens_SxBxL1, documents_SxBxL1


def read_plan(config: ConfigDict, members: Sequence[str]) -> np.ndarray:
    """Returns objective, stratum and strata of each row of each step, int32 [S, B, 3].

    Objectives are indices into `members`.
    """
    plan = MixturePlan(config)
    index_J = np.array([list(members).index(member.name) for member in plan.members], np.int32)
    rows = [plan.assign(step) for step in range(config.steps)]
    plan_SxBx3 = np.stack([np.stack(row, -1) for row in rows])
    plan_SxBx3[..., 0] = index_J[plan_SxBx3[..., 0]]
    return plan_SxBx3


def _join(parts: Sequence[np.ndarray], capacity: int) -> jax.Array:
    steps = max(capacity, sum(map(len, parts)))
    joined = np.zeros((steps, *parts[0].shape[1:]), parts[0].dtype)
    np.concatenate(parts, out=joined[: sum(map(len, parts))])
    return jnp.asarray(joined)


def _starts(sizes) -> list[int]:
    sizes = list(sizes)
    return (np.cumsum(sizes) - sizes).tolist()


def _batch_key(config: ConfigDict) -> str:
    """Returns a text that is equal for runs with the same batches."""
    has_pair = any(entry.rows > 1 for entry in trained_entries(config))
    shares = config.mixture.to_dict() if has_pair else None  # the rows of a pair share their sequences
    return repr((config.data.path, config.seed, config.steps, config.repetitions, shares))


def _plan_key(config: ConfigDict) -> str:
    return repr((config.steps, config.mixture.to_dict()))
