"""A process of a job in which single processes fail to save, at the start of a save or in the background."""

from __future__ import annotations

import sys

import jax
import orbax.checkpoint as ocp
from absl import app, flags, logging
from orbax.checkpoint._src.checkpointers import async_checkpointer

from dualsm.process import distributed
from dualsm.training.loop import train
from tests.micro import micro_config

_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0")
_PROCESSES = flags.DEFINE_integer("processes", None, "number of processes")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "index of this process")
_CORPUS = flags.DEFINE_string("corpus", None, "folder of the corpus")
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory")

STARTS = {4: 1, 10: 0}  # step -> process that fails before Orbax's first barrier
WRITES = {6: 1, 8: 0}  # step -> process whose write in the background fails


def _fail(by_step: dict[int, int], step: int) -> None:
    if by_step.get(step) == jax.process_index():
        raise OSError(5, f"the connection of process {jax.process_index()} was lost")


def _patch() -> None:
    save, commit = ocp.CheckpointManager.save, async_checkpointer._background_wait_for_commit_futures

    def failing_save(self, step, *args, **options):
        _fail(STARTS, step)
        return save(self, step, *args, **options)

    def failing_commit(directory, *args, **options):
        _fail(WRITES, int(directory.name.partition(".")[0]))
        return commit(directory, *args, **options)

    ocp.CheckpointManager.save = failing_save
    async_checkpointer._background_wait_for_commit_futures = failing_commit


def main(_) -> None:
    logging.set_verbosity(logging.FATAL)  # the log of Orbax would fill the pipe to the test
    with distributed.job(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value):
        config = micro_config(_CORPUS.value)
        config.steps, config.mesh.data, config.optimizer.name = 12, -1, "adamw"
        config.checkpoint.every, config.checkpoint.max_to_keep, config.valid.objectives = 2, 99, ""
        config.checkpoint.max_failed_saves = 9
        _patch()
        assert train(config, _WORKDIR.value, distributed.preempted)
    sys.exit(0)


if __name__ == "__main__":
    app.run(main)
