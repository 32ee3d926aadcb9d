"""Trains a model, or resumes the run in --workdir.

python -m dualsm.train --config=configs/tiny.py --workdir=runs/tiny
python -m dualsm.train --config=configs/tiny.py --workdir=runs/other --config.mixture.causal=0.75 ...

For a multi-process job, start the same command once per process. On TPU slices and under SLURM the processes
find each other; elsewhere add --coordinator=HOST:PORT --processes=N --process_id=I. See launch/ and
docs/scaling.md.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence

import jax
from absl import flags
from ml_collections import config_flags

from dualsm.process import cli, distributed
from dualsm.process.progress import say
from dualsm.training.cpu_devices import cpu_devices
from dualsm.training.loop import train
from dualsm.training.profile import parse_window

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file; see configs/")
_WORKDIR = cli.DEFINE_path("workdir", None, "run directory; if it contains this run, the run is resumed")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if it is not detected")
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "number of processes of the job; 1: no other processes", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "index of this process, from 0", lower_bound=0)
_STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status", 0, "exit status if a signal stopped the run before its end; launchers requeue on it"
)
_PROFILE = flags.DEFINE_string(
    "profile", None, "FIRST:LAST; writes a trace of these steps to profile/ in --workdir, for TensorBoard"
)
flags.mark_flags_as_required(["config", "workdir"])

SAME_SIGNAL_SECONDS = 1.0  # a signal repeated within this time is treated as one signal


def main(_: Sequence[str]) -> None:
    status, window = 0, parse_window(_PROFILE.value) if _PROFILE.value is not None else None
    with distributed.job(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value):
        config, alone = cli.config(_CONFIG), not jax.distributed.is_initialized()
        cli.set_up_jax(cpu_devices(config) if alone else 0)
        stop = distributed.preempted if jax.process_count() > 1 else _on_signals()
        finished = train(config, _WORKDIR.value, stop, window)
        if not finished:
            say(f"stopped by a signal; run the same command to resume:\n  {_command()}")
            status = _STOPPED_STATUS.value
    sys.exit(status)


def _on_signals() -> Callable[[int], bool]:
    """Returns a function that returns True once the process has received SIGTERM, SIGHUP or Ctrl-C."""
    times = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _stop(number, times))
    distributed.on_hangup(lambda: _stop(signal.SIGHUP, times))
    return lambda step: bool(times)


def _stop(number: int, times: list[float]) -> None:
    """Requests that the run saves and stops; a second signal kills the process.

    At a preemption without GraceTime, both SLURM's daemon and `srun` send SIGTERM.
    """
    if times:
        if time.monotonic() - times[0] > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)
        return
    times.append(time.monotonic())
    text = f"\n{signal.Signals(number).name}: finishing the step and saving (send it again to quit)"
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(text, file=sys.stderr, flush=True)


def _command() -> str:
    return shlex.join(["python", "-m", "dualsm.train", *sys.argv[1:]])


if __name__ == "__main__":
    cli.run(main)
