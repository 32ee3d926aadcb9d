"""A process of a job whose main process cannot write files when step 4 is saved."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

from absl import app, flags

from dualsm.process import distributed
from dualsm.training.loop import train
from tests.micro import micro_config

_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0")
_PROCESSES = flags.DEFINE_integer("processes", None, "number of processes")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "index of this process")
_CORPUS = flags.DEFINE_string("corpus", None, "folder of the corpus")
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory")


def _limit_files(step: int) -> None:
    """Limits file sizes from step 4 (after the checkpoint of step 2 is complete) until step 5."""
    while step == 4 and not (Path(_WORKDIR.value) / "checkpoints" / "2").exists():
        time.sleep(0.1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0 if step == 4 else hard, hard))


def main(_) -> None:
    with distributed.job(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value):
        config = micro_config(_CORPUS.value)
        config.steps, config.mesh.data, config.optimizer.name = 6, -1, "adamw"
        config.checkpoint.every, config.checkpoint.max_to_keep, config.valid.objectives = 2, 9, ""

        def stop(step: int) -> bool:
            if distributed.is_main_process():
                _limit_files(step)
            return distributed.preempted(step)

        assert train(config, _WORKDIR.value, stop)
    sys.exit(0)


if __name__ == "__main__":
    app.run(main)
