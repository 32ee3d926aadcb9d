"""Forking a run: starting from a checkpoint of another run (`config.start`)."""

from __future__ import annotations

from collections.abc import Callable

import jax
from etils import epath
from ml_collections import ConfigDict

from dualsm.data.corpus import TOKENIZER, Corpus
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.process.errors import UserError
from dualsm.rundir.checkpoint import find_step, restore_parts
from dualsm.rundir.workdir import CONFIG, read_config
from dualsm.training.step import TrainState


def start_step(config: ConfigDict, workdir: epath.Path, corpus: Corpus) -> int:
    """Returns the step of the checkpoint that a run is forked from, -1 if it is not forked.

    Which one is the newest is decided at the run's first start, for the other run may go on. Later starts
    take what the workdir's config says.

    Raises:
      UserError: at the first start, when there is no such checkpoint, it does not lie before the end of this
        run, or the other run's tokenizer is not the corpus's.
    """
    start = config.start
    if not start.run:
        return start.step
    if (workdir / CONFIG).exists():
        return read_config(workdir).start.step if start.step == -1 else start.step
    step = find_step(start.run, start.step if start.step >= 0 else None)
    _check_end(step, config)
    tokenizer = epath.Path(start.run) / TOKENIZER
    if load_tokenizer(str(tokenizer)).sha256() != corpus.manifest["tokenizer_sha256"]:
        raise UserError(
            f"the corpus {corpus.folder} was made with another tokenizer than config.start.run={start.run}; "
            f"prepare it with --tokenizer={tokenizer}"
        )
    return step


def branched_state(
    config: ConfigDict, workdir: epath.Path, abstract_state: TrainState, init: Callable[[], TrainState]
) -> TrainState:
    """Returns the state of another run's checkpoint, as if this run had trained up to that step.

    Args:
      config: of the run.
      workdir: of the run, which holds its config.
      abstract_state: what to restore into.
      init: makes the state before the first step.

    Raises:
      UserError: when there is no such checkpoint, it is damaged, or of another model or optimizer.
    """
    start = read_config(workdir).start  # there all processes read the same step
    parts = {name: getattr(abstract_state, name) for name in ("step", "params", "opt_state")}
    step, parts = restore_parts(start.run, parts, start.step if start.step >= 0 else None)
    _check_end(step, config)  # an older config may have -1 there
    # The rest alone: with weights and an optimizer of its own the state would be held twice.
    rest = [name for name in abstract_state._fields if name not in parts]
    shardings = [jax.tree.map(lambda leaf: leaf.sharding, getattr(abstract_state, name)) for name in rest]
    make = jax.jit(lambda: [getattr(init(), name) for name in rest], out_shardings=shardings)
    return abstract_state._replace(**parts, **dict(zip(rest, make(), strict=True)))


def _check_end(step: int, config: ConfigDict) -> None:
    """Raises `UserError` unless a checkpoint leaves steps to train."""
    if step >= config.steps:
        raise UserError(
            f"config.start: the checkpoint of step {step} in {config.start.run} does not lie before the end "
            f"of this run, config.steps={config.steps}"
        )
