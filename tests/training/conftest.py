"""The train step of the micro config, and its batches."""

import jax
import numpy as np
import pytest

from dualsm.objectives.example import SpecialIds
from dualsm.objectives.pairs import members_of
from dualsm.objectives.plan import MixturePlan
from dualsm.objectives.shares import trained_entries
from dualsm.optimizers.optimizer import make_optimizer
from dualsm.training.step import Batch, init_state, make_train_step
from tests.micro import micro_config


class Micro:
    """The train step of a micro config, with random batches whose rows have different loss denominators.

    The learning rate is constant unless a schedule is given.
    """

    def __init__(self, schedule=None, **changes):
        config = micro_config()
        config.model.vocab_size = 128
        for key, value in changes.items():
            *folders, name = key.split(".")
            place = config
            for folder in folders:
                place = place[folder]
            place[name] = value
        self.config = config
        self.entries = trained_entries(config)
        self.names = [member.name for member in members_of(self.entries)]
        schedule = schedule or (lambda _: config.optimizer.learning_rate)
        self.optimizer = make_optimizer(config.optimizer, schedule, config.steps)
        self.step = make_train_step(config, self.entries, SpecialIds(), self.optimizer)
        self.init = lambda: init_state(config, self.optimizer, len(self.names))

    def batch(self, step: int = 0) -> Batch:
        rows, length = self.config.batch_size, self.config.seq_len + 1
        rng = np.random.default_rng(step)
        tokens = rng.integers(16, 128, (rows, length)).astype(np.int32)
        documents = np.cumsum(rng.random((rows, length)) < 0.1, axis=1).astype(np.int32)
        documents[0, length // 4 :] = -1  # very different loss denominators
        documents[1, length // 2 :] = -1
        plan = MixturePlan(self.config)
        sequence_B = plan.row_sources(step)[1] - plan.sequences(step)
        return Batch(tokens[sequence_B], documents[sequence_B], *plan.assign(step))

    def run(self, steps: int = 1):
        """Returns the state after some steps, unsharded."""
        state, step = jax.jit(self.init)(), jax.jit(self.step)
        for s in range(steps):
            state, _ = step(state, self.batch(s))
        return state


@pytest.fixture(scope="session")
def micro_step() -> Micro:
    return Micro()
