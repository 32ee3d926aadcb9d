"""Forking a run: starting from a checkpoint of another run (`config.start`)."""

from __future__ import annotations

from collections.abc import Callable

import jax
from etils import epath
from ml_collections import ConfigDict

from dualsm.config import difference
from dualsm.data.corpus import TOKENIZER, Corpus
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.process.errors import UserError
from dualsm.process.paths import user_path
from dualsm.rundir.checkpoint_reader import find_step, restore_parts
from dualsm.rundir.workdir import CONFIG, read_config
from dualsm.training.step import TrainState, with_params


def start_step(config: ConfigDict, workdir: epath.Path, corpus: Corpus) -> int:
    """Returns the step of the checkpoint that a run is forked from, or -1 if it is not forked.

    The newest checkpoint is looked up only at the run's first start, because the other run may continue to
    train. Later starts read the step from the config in the run directory.

    Args:
      config: the run's config.
      workdir: the run directory.
      corpus: the run's corpus.

    Raises:
      UserError: at the first start, if the checkpoint does not exist or is not before the end of this run, or
        if the other run has another tokenizer than the corpus.
    """
    start = config.start
    if not start.run:
        return start.step
    if (workdir / CONFIG).exists():
        return read_config(workdir).start.step if start.step == -1 else start.step
    step = find_step(start.run, start.step if start.step >= 0 else None)
    _check_end(step, config)
    tokenizer = user_path(start.run) / TOKENIZER
    if load_tokenizer(str(tokenizer)).sha256() != corpus.manifest["tokenizer_sha256"]:
        raise UserError(
            f"the corpus {corpus.folder} has another tokenizer than config.start.run={start.run}; "
            f"prepare the corpus with --tokenizer={tokenizer}"
        )
    return step


def never_predicted(config: ConfigDict, workdir: epath.Path) -> str:
    """Returns `config.model.never_predicted`; if it is empty, that of the run to continue or to fork."""
    if not config.model.never_predicted:
        for run in (workdir, config.start.run):
            if run and (user_path(run) / CONFIG).exists():
                return read_config(run).model.never_predicted
    return config.model.never_predicted


def forked_state(
    config: ConfigDict, workdir: epath.Path, abstract_state: TrainState, init: Callable[[], TrainState]
) -> TrainState:
    """Returns the train state of another run's checkpoint, as if this run had trained up to that step.

    Args:
      config: the run's config.
      workdir: the run directory, which already contains the config.
      abstract_state: shapes, dtypes and shardings of the state.
      init: returns the state before the first step.

    Raises:
      UserError: if the checkpoint does not exist, is damaged, or is of another model or optimizer.
    """
    start = read_config(workdir).start  # the same step in all processes
    parts = {name: getattr(abstract_state, name) for name in ("step", "params", "opt_state")}
    if hasattr(abstract_state, "ema"):
        parts["ema"] = abstract_state.ema
    try:
        step, parts = restore_parts(start.run, parts, start.step if start.step >= 0 else None)
    except UserError as error:
        changes = difference(read_config(start.run), config)
        changes = [change for change in changes if change.startswith(("model.", "optimizer."))]
        if not changes:
            raise
        raise UserError(f"{error}; the runs differ in {'; '.join(changes)}") from error
    _check_end(step, config)  # the config of an older version may contain -1
    return with_initial(abstract_state, parts, init)


def with_initial(abstract_state: TrainState, parts: dict, init: Callable[[], TrainState]) -> TrainState:
    """Returns a train state with the given fields, and the other fields as before the first step.

    Args:
      abstract_state: shapes, dtypes and shardings of the state.
      parts: values by name of the field. A moving average that is not among them starts from `params`.
      init: returns the state before the first step.
    """
    # Initialize the other fields only: a complete second state would double the peak memory.
    rest = [name for name in abstract_state._fields if name not in (*parts, "ema")]
    shardings = [jax.tree.map(lambda leaf: leaf.sharding, getattr(abstract_state, name)) for name in rest]
    make = jax.jit(lambda: [getattr(init(), name) for name in rest], out_shardings=shardings)
    state = abstract_state._replace(**parts, **dict(zip(rest, make(), strict=True)))
    return state if "ema" in parts or not hasattr(state, "ema") else with_params(state, state.params)


def _check_end(step: int, config: ConfigDict) -> None:
    """Raises `UserError` if no steps are left to train after the checkpoint."""
    if step >= config.steps:
        raise UserError(
            f"config.start: step {step} of {config.start.run} is not before the end of this run "
            f"(config.steps={config.steps}); train for more steps or fork an earlier checkpoint"
        )
