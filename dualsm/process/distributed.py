"""Many processes as one job: joining them, agreeing between them, ending them together.

All of it is JAX's own (`jax.distributed`): its coordinator runs in process 0, watches the others by
heartbeat and ends those that are left when one is gone. Processes agree and wait through the coordinator, not
in a collective of their devices: those time out after half a minute when processes first meet in them.
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

from dualsm.process.errors import UNREAD, UserError, explained, unread
from dualsm.process.progress import drop_terminal

JOIN_SECONDS = 300  # for all processes to appear
HEARTBEAT_SECONDS = 30  # of silence, after which a process counts as dead
LEAVE_SECONDS = 60  # for all processes to leave, once all have come to the end
WAIT_SECONDS = 7 * 24 * 3600  # for a process that lives but is slow; a dead one is noticed by its heartbeat

_meetings, _stop_checks = itertools.count(), itertools.count()


class PeerError(Exception):
    """A failure of another process of the job that is not a user's mistake."""


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
    # The handler of SIGTERM is JAX's: it tells all processes, see `preempted`.
    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    on_hangup(lambda: signal.raise_signal(signal.SIGTERM))
    try:
        with contextlib.ExitStack() as stack:
            if not is_main_process():
                silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            barrier()
            # Connects the devices now: after compiling, processes may be too far apart for that.
            multihost_utils.sync_global_devices("joined")
            yield
    except BaseException as error:
        told, status = _ending(error)
        if not told:
            sys.excepthook(*sys.exc_info())
        _die(f"error: {me}{told or ' failed'}", status, agreed=getattr(error, "agreed", False))
    barrier()  # one may still upload its metrics, for longer than `shutdown` waits
    jax.distributed.shutdown()


def is_main_process() -> bool:
    """Whether this is the process that prints and writes for all."""
    return jax.process_index() == 0


def preempted(step: int) -> bool:
    """Returns True once SIGTERM has reached any process, after the same call in all of them.

    Every process must call this equally often. JAX only compares the numbers of calls.
    """
    del step  # a step may ask several times
    return multihost_utils.reached_preemption_sync_point(next(_stop_checks))


def gather(text: str) -> dict[int, str]:
    """Returns the texts of all processes by process number, without empty ones.

    Every process must call this, and all of the functions below.
    """
    if jax.process_count() == 1:
        return {0: text} if text else {}
    client, folder = global_state.client, f"dualsm/{next(_meetings)}/"
    if text:
        client.key_value_set(f"{folder}{jax.process_index()}", text)
    client.wait_at_barrier(folder, WAIT_SECONDS * 1000)
    return {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(folder)}


def all_agree(holds: bool) -> bool:
    """Returns True when `holds` is true in every process."""
    return not gather("" if holds else "no")


def barrier() -> None:
    """Returns once every process has come here, however long that takes."""
    gather("")


def from_main(text: str) -> str:
    """Returns the `text` of the main process."""
    return gather(text if is_main_process() else "").get(0, "")


def leads_host() -> bool:
    """Returns True in the first process of each machine."""
    hosts = gather(socket.gethostname())
    me = jax.process_index()
    return all(host != hosts[me] for process, host in hosts.items() if process < me)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs a block in every process, and ends all of them with one message where it fails in one.

    No process leaves the block before all have come to its end, so a slow one is waited for.

    Raises:
      UserError: when another process has made a user's mistake.
      PeerError: when another process failed otherwise.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    own = "" if failure is None else "user " + text if (text := explained(failure)) else "other"
    failed = gather(own)
    if failure is None and failed:
        process, text = min(failed.items())
        kind, _, text = text.partition(" ")
        failure = UserError(f"process {process}: {text}")
        if kind != "user":
            failure = PeerError(f"process {process} failed")
    if failure is not None:
        failure.agreed = True  # all processes end, see `_die`, or go on, see `Checkpoints`
        raise failure


def on_hangup(stop: Callable[[], None]) -> None:
    """Calls `stop` when the terminal goes away, unless that signal is ignored, as under nohup."""

    def handle(*_) -> None:
        drop_terminal()
        stop()

    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handle)


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
    if isinstance(error, PeerError):
        return f" ends: {error}", 1
    by_gloo = isinstance(error, ValueError) and "Gloo" in str(error)  # between CPUs; raised as either
    if by_gloo or isinstance(error, jax.errors.JaxRuntimeError):
        reason = str(error).strip().partition("\n")[0]
        return f" lost the others or its device, run the same command to resume ({reason})", 1
    return "", 1


def _die(message: str, status: int, agreed: bool) -> None:
    """Ends this process at once: leaving in an orderly way would wait for the others.

    Where all have agreed to end, they leave together: the coordinator must not go before those that it
    watches.
    """
    with contextlib.suppress(OSError):  # where nobody reads it
        print(" ".join(message.split()), file=sys.stderr, flush=True)
        sys.stdout.flush()
    if agreed:
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
    os._exit(status)
