"""Many processes as one job: joining them, agreeing between them, ending them together.

All of it is JAX's own (`jax.distributed`): its coordinator runs in process 0, watches the others by
heartbeat and ends those that are left when one is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from dualsm.errors import UNREAD, UserError, explained, unread

JOIN_SECONDS = 300  # for all processes to appear
HEARTBEAT_SECONDS = 30  # of silence, after which a process counts as dead
LEAVE_SECONDS = 60  # that a process which is done waits for the others


@contextlib.contextmanager
def job(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Makes this process a part of its job for the time inside; alone, it does nothing, and JAX has not
    looked for its devices yet.

    Without arguments TPU slices, SLURM steps, Open MPI and Kubernetes are recognised by their environment.
    Only process 0 prints to stdout. An error in one process ends that process at once, and with it the job.

    Args:
      coordinator: "host:port" at which process 0 listens.
      processes: how many there are; 1 keeps this process alone, whatever its environment says.
      process_id: of this one, from 0.

    Raises:
      UserError: when the job cannot be joined.
    """
    _join(coordinator, processes, process_id)
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        yield
        return
    me = f"process {jax.process_index()} of {jax.process_count()}"
    # The handler of SIGTERM is JAX's: it tells all processes, see `asked_to_stop`.
    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        with contextlib.ExitStack() as stack:
            if not leads():
                silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            yield
    except BaseException as error:
        told, status = _ending(error)
        if not told:
            sys.excepthook(*sys.exc_info())
        _die(f"error: {me}{told or ' failed'}", status)
    jax.distributed.shutdown()


def leads() -> bool:
    """Whether this is the process that prints and writes for all."""
    return jax.process_index() == 0


def asked_to_stop(step: int) -> bool:
    """Whether SIGTERM reached any process: becomes true at the same step in all of them.

    To be asked after every step, by every process.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def all_agree(holds: bool) -> bool:
    """Whether something holds in every process; all of them must ask."""
    return bool(multihost_utils.process_allgather(holds).all()) if jax.process_count() > 1 else holds


def wait_for_all(where: str) -> None:
    """Returns once every process has come here."""
    multihost_utils.sync_global_devices(where)


def _join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    given = [coordinator, processes, process_id]
    if processes == 1:
        return
    if None in given and given != [None] * 3:
        raise UserError("--coordinator, --processes and --process_id belong together")
    if process_id is not None and process_id >= processes:
        raise UserError(f"--process_id={process_id} must lie below --processes={processes}")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={coordinator} must read HOST:PORT")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except Exception as error:  # whatever a cluster's metadata and network make it raise
        if coordinator is None and "coordinator_address should be defined" in str(error):
            return  # no cluster here
        raise UserError(
            f"cannot join the processes of this job ({error}); --processes=1 trains on this machine alone"
        ) from error


def _ending(error: BaseException) -> tuple[str, int]:
    """What to tell of the error that ends a process, nothing of a defect; and its exit status."""
    if text := explained(error):
        return f": {text}", 2
    if unread(error):
        return ": nobody reads what it prints", UNREAD
    by_gloo = isinstance(error, ValueError) and "Gloo" in str(error)  # between CPUs; raised as either
    if by_gloo or isinstance(error, jax.errors.JaxRuntimeError):
        reason = str(error).strip().partition("\n")[0]
        return f" lost the others or its device, run the same command to resume ({reason})", 1
    return "", 1


def _die(message: str, status: int) -> None:
    """Ends this process at once: leaving in an orderly way would wait for the others."""
    with contextlib.suppress(OSError):  # where nobody reads it
        print(" ".join(message.split()), file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)
