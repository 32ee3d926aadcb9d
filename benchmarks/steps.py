"""Training steps for benchmarks, and their timing."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dualsm.devices.sharding import shard_batch
from dualsm.objectives.example import SpecialIds
from dualsm.objectives.plan import MixturePlan
from dualsm.training.program import compile_train_step
from dualsm.training.step import Batch

MIXTURES = {
    "causal": {"causal": 1.0},
    "mixture": {"causal": 0.5, "prefix": 0.25, "masked_diffusion": 0.25},
}


class Steps:
    """Training steps of a config on one batch of random tokens, with one document per sequence.

    Attributes:
      memory: XLA's memory analysis of the compiled step.
      sums: step metrics of the last step.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh):
        """Compiles the step.

        Args:
          config: config of a run, with `model.vocab_size` set.
          mesh: the devices.
        """
        self._mesh = mesh
        tokens_BxL1 = random_tokens(config)
        rows = (tokens_BxL1, np.zeros_like(tokens_BxL1), *MixturePlan(config).assign(0))
        with jax.set_mesh(mesh):
            program = compile_train_step(config, SpecialIds(vocab_size=config.model.vocab_size), mesh)
            self._batch = Batch(*(shard_batch(mesh, x) for x in rows))
            self._state = program.init()
            self._step = program.step.lower(self._state, self._batch).compile()
        self.memory = self._step.memory_analysis()

    def __call__(self) -> None:
        """Runs one step and waits for it."""
        with jax.set_mesh(self._mesh):
            self._state, self.metrics = self._step(self._state, self._batch)
            jax.block_until_ready(self._state)


def random_tokens(config: ConfigDict) -> np.ndarray:
    """Returns a fixed batch of random tokens, int32 [B, L + 1]."""
    shape = (config.batch_size, config.seq_len + 1)
    return np.random.default_rng(0).integers(16, config.model.vocab_size, shape).astype(np.int32)


def repeated(step: Callable[[], object], seconds: float) -> Callable[[], float]:
    """Warms up; returns a function that runs `step` for about `seconds` and returns seconds per step."""
    step()
    step()
    start = time.perf_counter()
    step()
    count = max(1, round(seconds / (time.perf_counter() - start)))

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - start) / count

    return measure
