"""Jobs of several processes: start, agreement, failure and shutdown.

Uses `jax.distributed`: its coordinator runs in process 0, monitors the other processes by heartbeat, and ends
the job if one dies. Processes exchange messages through the coordinator instead of a collective on their
devices: the first collective times out if processes reach it more than half a minute apart.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import jax
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from dualsm.process.errors import BROKEN_PIPE, UserError, exit_status, is_broken_stdout, user_message
from dualsm.process.progress import drop_terminal

JOIN_SECONDS = 300  # limit for all processes to join
HEARTBEAT_SECONDS = 30  # a process without a heartbeat for this long counts as dead
LEAVE_SECONDS = 60  # limit for all processes to shut down at the end
WAIT_SECONDS = 7 * 24 * 3600  # limit for slow processes; heartbeats detect dead ones

_barriers, _stop_checks = itertools.count(), itertools.count()


class PeerError(Exception):
    """A failure of another process of the job that is not a `UserError`."""


@contextlib.contextmanager
def job(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Context in which this process is part of a job; does nothing for a single process.

    Without arguments, JAX detects TPU slices, SLURM steps, Open MPI and Kubernetes from the environment. Only
    process 0 prints to stdout. An error in one process ends that process immediately, which ends the job.
    For a single process, JAX's backends are not initialized.

    Args:
      coordinator: "host:port" on which process 0 listens.
      processes: number of processes; 1 ignores the environment.
      process_id: index of this process, from 0.

    Raises:
      UserError: if this process cannot join the job.
    """
    _join(coordinator, processes, process_id)
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        yield
        return
    me = f"process {jax.process_index()} of {jax.process_count()}"
    # JAX handles SIGTERM and informs all processes, see `preempted`.
    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    on_hangup(lambda: signal.raise_signal(signal.SIGTERM))
    try:
        with contextlib.ExitStack() as stack:
            if not is_main_process():
                devnull = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))
                stack.enter_context(contextlib.redirect_stdout(devnull))
            barrier()
            # Connect the devices now: after compilation, processes may reach a collective too far apart.
            multihost_utils.sync_global_devices("joined")
            yield
    except BaseException as error:
        message, status = _exit_message(error)
        if not message:
            sys.excepthook(*sys.exc_info())
        _die(f"error: {me}{message or ' failed'}", status, agreed=getattr(error, "agreed", False))
    barrier()  # uploading metrics may take longer than `shutdown` waits
    jax.distributed.shutdown()


def is_main_process() -> bool:
    """Returns True in process 0, which prints and writes for all processes."""
    return jax.process_index() == 0


def preempted(step: int) -> bool:
    """Returns True once any process has received SIGTERM; all processes get the same result.

    Every process must call this function equally often, because JAX matches calls by their number.
    """
    del step  # there may be several calls per step
    return multihost_utils.reached_preemption_sync_point(next(_stop_checks))


def gather(text: str) -> dict[int, str]:
    """Returns the texts of all processes by process index, without empty ones.

    Every process must call `gather` and the functions below, which use it.
    """
    if jax.process_count() == 1:
        return {0: text} if text else {}
    return exchange(f"dualsm/{next(_barriers)}/", text, WAIT_SECONDS * 1000)


def exchange(folder: str, text: str, timeout_ms: int) -> dict[int, str]:
    """Returns the texts of all processes by process index, without empty ones. Thread-safe.

    Args:
      folder: unique name of this exchange, ending in "/"; the same in all processes.
      text: text of this process.
      timeout_ms: limit for all processes to arrive.
    """
    client = global_state.client
    if text:
        client.key_value_set(f"{folder}{jax.process_index()}", text)
    client.wait_at_barrier(folder, timeout_ms)
    return {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(folder)}


def forget(folder: str) -> None:
    """Deletes the texts of an exchange from the memory of the coordinator."""
    global_state.client.key_value_delete(folder)


def all_agree(condition: bool) -> bool:
    """Returns True if `condition` is true in every process."""
    return not gather("" if condition else "no")


def any_process(condition: bool) -> bool:
    """Returns True if `condition` is true in at least one process."""
    return bool(gather("yes" if condition else ""))


def barrier() -> None:
    """Waits until every process has called this function."""
    gather("")


def broadcast(text: str) -> str:
    """Broadcasts the `text` of the main process."""
    return gather(text if is_main_process() else "").get(0, "")


def is_first_on_host() -> bool:
    """Returns True in the process with the lowest index on each host."""
    hosts = gather(socket.gethostname())
    me = jax.process_index()
    return all(host != hosts[me] for process, host in hosts.items() if process < me)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Context for a block that every process runs: if it fails in one process, it fails in all.

    Processes wait for each other at the end of the block.

    Raises:
      UserError: if the block raised an error that a user can fix in another process.
      PeerError: if the block failed for another reason in another process.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    text = user_message(failure) or ""
    kind = "user" if text and exit_status(failure) == 2 else "other"
    failed = gather("" if failure is None else f"{kind} {text}")
    if failure is None and failed:
        process, text = min(failed.items())
        kind, _, text = text.partition(" ")
        failure = UserError(f"process {process}: {text}")
        if kind != "user":
            failure = PeerError(f"process {process} failed{': ' * bool(text)}{text}")
    if failure is not None:
        failure.agreed = True  # all processes either exit, see `_die`, or continue, see `Checkpoints`
        raise failure


def on_hangup(stop: Callable[[], None]) -> None:
    """Calls `stop` on SIGHUP, when the terminal closes, unless the signal is ignored, as under nohup."""

    def handle(*_) -> None:
        drop_terminal()
        stop()

    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handle)


def _join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    given = [coordinator, processes, process_id]
    if processes is not None and process_id is not None and process_id >= processes:
        raise UserError(f"--process_id={process_id} must be less than --processes={processes}")
    if processes == 1:
        return
    if None in given and given != [None] * 3:
        raise UserError(
            "--coordinator, --processes and --process_id belong together; set all of them or none"
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={coordinator} must have the form HOST:PORT")
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
    except Exception as error:  # cluster detection and the network can raise anything
        if coordinator is None and "coordinator_address should be defined" in str(error):
            return  # not in a cluster
        raise UserError(
            f"cannot join the processes of this job ({error}); --processes=1 trains on this machine alone"
        ) from error


def _exit_message(error: BaseException) -> tuple[str, int]:
    """Returns message and exit status for an error that ends this process; an empty message for a bug."""
    if text := user_message(error):
        return f": {text}", exit_status(error)
    if is_broken_stdout(error):
        return ": broken pipe on stdout", BROKEN_PIPE
    if isinstance(error, PeerError):
        return f" stopped: {error}", 1
    by_gloo = isinstance(error, ValueError) and "Gloo" in str(error)  # collectives of CPUs raise either type
    if by_gloo or isinstance(error, jax.errors.JaxRuntimeError):
        reason = str(error).strip().partition("\n")[0]
        return f" lost the other processes or its device; run the same command to resume ({reason})", 1
    return "", 1


def _die(message: str, status: int, agreed: bool) -> None:
    """Ends this process immediately, because an orderly exit would wait for the other processes.

    If all processes agreed to exit, they shut down together, so that the coordinator does not exit first.
    """
    with contextlib.suppress(OSError):  # stderr may be closed
        print(" ".join(message.split()), file=sys.stderr, flush=True)
        sys.stdout.flush()
    if agreed:
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
    os._exit(status)
