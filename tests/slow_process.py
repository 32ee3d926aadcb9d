"""A process of a job whose main process is slow at the start and at the end."""

from __future__ import annotations

import sys
import time

from absl import app, flags
from jax.experimental import multihost_utils

from dualsm.process import distributed

_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0")
_PROCESSES = flags.DEFINE_integer("processes", None, "number of processes")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "index of this process")
_FIRST_MEETING = 30  # seconds that Gloo waits for the processes of a collective to connect
distributed.LEAVE_SECONDS = 3


def main(_) -> None:
    with distributed.job(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value):
        with distributed.together():
            if distributed.is_main_process():
                time.sleep(_FIRST_MEETING + 5)
        assert multihost_utils.process_allgather(_PROCESS_ID.value).tolist() == [0, 1]
        if distributed.is_main_process():
            time.sleep(distributed.LEAVE_SECONDS + 5)
    sys.exit(75)


if __name__ == "__main__":
    app.run(main)
