"""A micro model that has memorized one text under all three objectives."""

import functools

import jax
import numpy as np
import pytest

from dualsm.config import freeze
from dualsm.objectives.example import SpecialIds
from dualsm.objectives.mixture import assign, sequence_counts
from dualsm.objectives.shares import trained_entries
from dualsm.optimizers.optimizer import make_optimizer
from dualsm.training.step import Batch, init_state, make_train_step
from tests.micro import micro_config

VOCABULARY = 64


class Memorized:
    """The memorized text (from `<s>` to `</s>`), and the config and parameters of the model."""

    def __init__(self, steps: int = 250):
        config = micro_config()
        config.steps, config.batch_size = steps, 8
        config.model.vocab_size = VOCABULARY
        rng = np.random.default_rng(0)
        text = [2, *rng.integers(16, VOCABULARY, 31).tolist(), 3]
        config.seq_len = len(text) - 1
        entries = trained_entries(config)
        optimizer = make_optimizer(config.optimizer, lambda _: 7e-3, config.steps)
        step = jax.jit(make_train_step(config, entries, SpecialIds(), optimizer), donate_argnums=0)
        state = jax.jit(functools.partial(init_state, config, optimizer, len(entries)))()
        counts = sequence_counts(
            np.tile([config.mixture[entry.name] for entry in entries], (1, 1)), config.batch_size
        )[0]
        tokens = np.tile(np.array(text, np.int32), (config.batch_size, 1))
        batch = Batch(tokens, np.zeros_like(tokens), *assign(counts))
        for _ in range(steps):
            state, _ = step(state, batch)
        self.text, self.config, self.params = text, freeze(config.model), state.params


@pytest.fixture(scope="session")
def memorized() -> Memorized:
    return Memorized()
