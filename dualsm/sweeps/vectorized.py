"""Trains many runs of one shape in one program on one device.

A run of a small model does not fill an accelerator. Here `jax.vmap` trains several runs at once, each at its
own step. When a run finishes, the next run takes its slot. The data of all runs is on the device. Nothing is
saved: the result of a run is its held-out losses.

Runs may differ in data, seed, repetitions, number of steps, shares and weights of the objectives, and weight
decay. Everything else must be equal, also the tokenizer, which the caller checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dualsm.config import difference
from dualsm.objectives.example import SpecialIds
from dualsm.objectives.pairs import Entry, members_of
from dualsm.objectives.shares import trained_entries
from dualsm.optimizers.optimizer import make_optimizer
from dualsm.process.errors import UserError
from dualsm.sweeps.vectorized_data import DeviceData, load_data
from dualsm.sweeps.vectorized_scores import HeldOutScores
from dualsm.training.step import init_state, make_train_step
from dualsm.training.step_metrics import StepMetrics
from dualsm.training.valid_rows import ValidRows

# Keys, or sections, in which the runs may differ.
FREE = ("data", "mixture", "objectives", "optimizer.weight_decay", "pairs", "repetitions", "seed", "steps")


class _Run(NamedTuple):
    """The values that differ between runs.

    Attributes:
      seed, steps, weight_decay: as in the config.
      first_batch, first_plan: index of the run's first step in `DeviceData`.
      weight_J: loss weight of each member of the mixture.
    """

    seed: jax.Array
    steps: jax.Array
    weight_decay: jax.Array
    first_batch: jax.Array
    first_plan: jax.Array
    weight_J: jax.Array


def train_together(
    configs: Mapping[str, ConfigDict],
    special: SpecialIds,
    splits: Mapping[str, ValidRows],
    scored: Sequence[str],
    slots: int,
    every: int,
    curve: str = "",
    processes: int = 1,
    capacity: int = 0,
    progress: Callable[[int], None] = lambda steps: None,
) -> Iterator[dict[str, Any]]:
    """Trains all runs, and yields the results of each as soon as it is complete.

    Args:
      configs: name of a run -> its complete config.
      special: the tokenizer's special ids.
      splits: name -> held-out rows.
      scored: objectives of the held-out losses.
      slots: number of runs that train at the same time.
      every: steps between two points of the learning curve; must divide the steps of every run.
      curve: the split that the learning curve scores, a quarter of its rows; "" for no curve.
      processes: number of processes that read the data.
      capacity: see `load_data`.
      progress: called every `every` steps with the total number of finished steps of all runs.

    Yields:
      `name`, `steps`, `skipped` (number of updates), `<split>/<objective>/loss` in nats per token and
      `<split>/<objective>/bits_per_byte`, the same of the average of the weights with the prefix `ema/` if
      the runs have one, and `curve`, a list of [step, train loss, loss of each scored objective]. The train
      loss is that of the steps since the last point; nan if all their updates were skipped.

    Raises:
      UserError: if the runs do not have one shape.
    """
    check_one_shape(configs, every)
    fleet = _Fleet(configs, special, every, processes, capacity)
    scores = HeldOutScores(next(iter(configs.values())), special, splits, scored)
    waiting = sorted(configs, key=lambda name: -configs[name].steps)
    names: list[str | None] = [None] * slots
    runs, curves, skipped, state = [fleet.run(waiting[0])] * slots, {}, {}, None
    finished = 0
    while waiting or any(names):
        fresh_K = np.zeros(slots, bool)
        for k, name in enumerate(names):
            if name is None and waiting:
                names[k] = waiting.pop(0)
                runs[k], fresh_K[k] = fleet.run(names[k]), True
                curves[names[k]], skipped[names[k]] = [], 0
        run_K = jax.tree.map(lambda *leaves: np.stack(leaves), *runs)
        state = fleet.refill(run_K, fleet.empty(run_K) if state is None else state, fresh_K)
        state = fleet.advance(run_K, state)
        step_K, skipped_K = np.asarray(state.step), np.asarray(state.metrics.skipped)
        train_K = np.asarray(_train_losses(state.metrics))
        busy = [k for k, name in enumerate(names) if name]
        losses = scores.curve_losses(curve, state.params, busy) if curve else [[] for _ in busy]
        for k, loss_O in zip(busy, losses, strict=True):
            curves[names[k]].append([int(step_K[k]), float(train_K[k]), *loss_O])
            skipped[names[k]] += int(skipped_K[k])  # of the last `every` steps
        finished += every * len(busy)
        progress(finished)
        done = [k for k in busy if step_K[k] >= configs[names[k]].steps]
        for k, metrics in zip(done, scores.final_metrics(state, done), strict=True):
            found = {"name": names[k], "steps": int(step_K[k]), "skipped": skipped.pop(names[k])}
            yield found | metrics | {"curve": curves.pop(names[k])}
            names[k] = None


def _train_losses(metrics: StepMetrics) -> jax.Array:
    """Returns the mean loss of the updates of each run in nats per token; nan without an update."""
    return jnp.where(metrics.steps > 0, metrics.loss / jnp.maximum(metrics.weight, 1), jnp.nan)


def check_one_shape(configs: Mapping[str, ConfigDict], every: int) -> None:
    """Raises `UserError` if the runs cannot train in one program."""
    first, base = next(iter(configs.items()))
    for name, config in configs.items():
        if changes := difference(base, config, FREE):
            raise UserError(f"the runs {first} and {name} differ in {'; '.join(changes)}")
        if config.steps % every:
            raise UserError(f"{name}: config.steps={config.steps} must be a multiple of {every}")
        schedule = config.optimizer.schedule
        if schedule.name != "wsd" or schedule.warmup_steps or schedule.final_fraction:
            raise UserError(
                f"{name}: config.optimizer.schedule must be wsd without warmup, with a decay to 0"
            )
        if config.optimizer.weight_decay_schedule.name == "linear" or config.sources:
            raise UserError(f"{name}: linear weight decay and config.sources are not supported here")


def common_entries(configs: Mapping[str, ConfigDict]) -> list[Entry]:
    """Returns the entries that any of the runs trains.

    Raises:
      UserError: if the options of an objective differ between runs, other than its loss weight.
    """
    found: dict[str, Entry] = {}
    for name, config in configs.items():
        for entry in trained_entries(config):
            known = found.setdefault(entry.name, entry)
            unweighted = [[member._replace(weight=1.0) for member in both.members] for both in (entry, known)]
            if unweighted[0] != unweighted[1]:
                raise UserError(f"{name}: other runs have other options of {entry.name}")
    return list(found.values())


class _Fleet:
    """The compiled functions of the runs; K is the number of slots."""

    def __init__(self, configs, special, every: int, processes: int, capacity: int):
        self._configs, self._special, self._every = configs, special, every
        self._base = next(iter(configs.values()))
        self._entries = common_entries(configs)
        self._members = [member.name for member in members_of(self._entries)]
        self._data, self._first = load_data(configs, self._members, processes, capacity)
        self.refill = jax.jit(self._refill, donate_argnums=1)
        self._advance = jax.jit(self._advance_slots, donate_argnums=1)

    def run(self, name: str) -> _Run:
        config = self._configs[name]
        weight_J = np.ones(len(self._members), np.float32)
        for member in members_of(trained_entries(config)):
            weight_J[self._members.index(member.name)] = member.weight
        return _Run(
            seed=np.int32(config.seed),
            steps=np.int32(config.steps),
            weight_decay=np.float32(config.optimizer.weight_decay),
            first_batch=np.int32(self._first.batch[name]),
            first_plan=np.int32(self._first.plan[name]),
            weight_J=weight_J,
        )

    def advance(self, run_K: _Run, state_K):
        """Returns the states after `every` steps; complete runs stay as they are."""
        return self._advance(run_K, state_K, self._data)

    def empty(self, run_K: _Run):
        """Returns states of the right shapes, to be refilled."""
        shapes = jax.eval_shape(jax.vmap(lambda run: self._functions(run)[0]()), run_K)
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def _functions(self, run: _Run) -> tuple[Callable, Callable]:
        """Returns the functions () -> state and (state, batch) -> (state, metrics) of a run."""
        config = ConfigDict(self._base.to_dict(), type_safe=False)
        config.seed, config.steps, config.log.every = run.seed, run.steps, self._every
        config.optimizer.weight_decay = run.weight_decay
        weights = iter(run.weight_J)
        entries = [
            entry._replace(members=tuple(m._replace(weight=next(weights)) for m in entry.members))
            for entry in self._entries
        ]
        schedule = wsd_schedule(self._base.optimizer, run.steps)
        optimizer = make_optimizer(config.optimizer, schedule, config.steps)
        step = make_train_step(config, entries, self._special, optimizer)
        return lambda: init_state(config, optimizer, len(self._members)), step

    def _refill(self, run_K: _Run, state_K, fresh_K: jax.Array):
        """Returns the states with those of the slots `fresh_K` replaced by new ones."""
        new_K = jax.vmap(lambda run: self._functions(run)[0]())(run_K)

        def choose(new, old):
            return jnp.where(fresh_K.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return jax.tree.map(choose, new_K, state_K)

    def _advance_slots(self, run_K: _Run, state_K, data: DeviceData):
        def one(run: _Run, state):
            index = jnp.minimum(state.step, run.steps - 1)
            batch = data.batch(run.first_batch + index, run.first_plan + index)
            new, _ = self._functions(run)[1](state, batch)
            return jax.tree.map(lambda a, b: jnp.where(state.step < run.steps, a, b), new, state)

        def all_slots(state_K, _):
            return jax.vmap(one)(run_K, state_K), None

        return jax.lax.scan(all_slots, state_K, length=self._every)[0]


def wsd_schedule(config: ConfigDict, steps: jax.Array) -> optax.Schedule:
    """Returns the `wsd` schedule without warmup and with a decay to 0, for a number of steps that is traced.

    It equals `dualsm.optimizers.schedules.learning_rate`, whose number of steps must be known.

    Args:
      config: `config.optimizer`.
      steps: int32 []; number of steps of the run.
    """
    decay = jnp.maximum(jnp.round(config.schedule.decay_fraction * steps), 1)
    return lambda step: config.learning_rate * jnp.clip((steps - step) / decay, 0, 1)
