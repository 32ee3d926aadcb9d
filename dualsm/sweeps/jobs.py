"""Runs the cells of a sweep on this machine, several at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from etils import epath

from dualsm.process.errors import UserError
from dualsm.process.paths import is_remote, retry, write_object
from dualsm.process.progress import StatusTable, say
from dualsm.rundir.checkpoint_folder import is_trained
from dualsm.sweeps.cells import CELL
from dualsm.sweeps.grid import Cell
from dualsm.sweeps.sweep_folder import Sweep

# These signals stop a sweep and its cells.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class _Job:
    """A running cell: a sequence of processes."""

    def __init__(self, sweep: Sweep, cell: Cell, slot: int, jobs: int):
        self.sweep, self.cell, self.slot, self.jobs = sweep, cell, slot, jobs
        self.start, self.waiting, self.outcome = time.monotonic(), deque(sweep.remaining(cell)), {}
        self.before = retry(self._seconds_before, sweep.folder)
        self.log = _local_log(log_file(sweep, cell))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        _clear(sweep.path(cell))
        self.process = self._next()

    def _seconds_before(self) -> float | None:
        """Returns the duration of the earlier sessions that this one continues; None if it is unknown."""
        if not is_trained(self.sweep.path(self.cell)):  # training starts from the beginning
            return 0.0
        return self.sweep.recorded(self.cell).get("seconds")

    def _next(self) -> subprocess.Popen:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        own = cores[self.slot :: self.jobs] or cores
        command, env = [sys.executable, *self.waiting.popleft()], os.environ | self.sweep.environment()
        with self.log.open("a") as log:
            # A new session: otherwise the run would receive a terminal's signal twice, and the second signal
            # ends a run without saving.
            process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        if own and self.jobs > 1:  # at this point the process has a single thread
            os.sched_setaffinity(process.pid, own)
        return process

    def finished(self) -> bool:
        """Returns True when the cell has ended, and records its outcome."""
        if self.process.poll() is None:
            return False
        if self.process.returncode == 0 and self.waiting:
            self.process = self._next()
            return False
        self.publish_log()
        outcome = self.sweep.outcome(self.cell) if self.process.returncode == 0 else None
        self.outcome = outcome or self._failure()
        self._record(self.outcome)
        return True

    def record_stop(self) -> None:
        """Records the time of a cell whose process a signal has ended; the cell still has to run."""
        self.publish_log()
        with contextlib.suppress(OSError):  # the time is then unknown
            # The process may have completed the cell before it received the signal.
            outcome = self.sweep.outcome(self.cell)
            folder = self.sweep.path(self.cell)
            if outcome or retry(lambda: is_trained(folder), folder):
                self._record(outcome or {"status": "running", "reason": ""})

    def _record(self, outcome: dict) -> None:
        seconds = None if self.before is None else self.before + time.monotonic() - self.start
        self.sweep.record(self.cell, outcome, seconds)

    def publish_log(self) -> None:
        """Copies the log to the folder of a sweep in a bucket."""
        target = log_file(self.sweep, self.cell)
        if is_remote(target) and self.log.exists():
            with contextlib.suppress(OSError):  # the copy is only for people to read
                write_object(target, self.log.read_bytes())

    def _failure(self) -> dict:
        """Returns the outcome of a failed process, with the last line of its log as the reason."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1][-500:] if lines else f"exit status {self.process.returncode}"
        _, error, line = reason.rpartition("error: ")  # a progress bar may precede the error on its line
        reason = error + line
        return {"status": "diverged" if "error: diverged" in reason else "failed", "reason": reason}


def log_file(sweep: Sweep, cell: Cell) -> epath.Path:
    """Returns the path of the log of a cell's processes."""
    return sweep.folder / "logs" / f"{cell.name}.log"


def _local_log(log: epath.Path) -> Path:
    """Returns a local path for a log, because objects in a bucket cannot be appended to."""
    return Path(tempfile.mkdtemp(prefix="dualsm-")) / log.name if is_remote(log) else Path(log)


def run_missing(sweep: Sweep, jobs: int) -> dict[str, dict]:
    """Runs the cells that are neither done nor diverged, `jobs` at a time, and shows their status.

    Returns:
      The outcome of each cell that ran, by name.

    Raises:
      KeyboardInterrupt: after a stop signal, when all cells have saved and ended.
    """
    waiting: deque[Cell] = deque()
    for cell in sweep.cells:
        outcome, recorded = sweep.outcome(cell), sweep.recorded(cell)
        if outcome is None:
            waiting.append(cell)
        elif outcome["status"] != recorded.get("status"):
            # A stopped cell ended on another machine, which took an unknown time.
            is_known = recorded.get("status") != "running"
            sweep.record(cell, outcome, recorded.get("seconds") if is_known else None)
    running: dict[int, _Job] = {}
    outcomes: dict[str, dict] = {}
    with _record_signals() as signals, StatusTable(sweep.header()) as status:
        try:
            while (waiting or running) and not signals:
                for slot in range(jobs):
                    if slot not in running and waiting:
                        running[slot] = _Job(sweep, waiting.popleft(), slot, jobs)
                status.show([sweep.row(cell) for cell in sweep.cells])
                time.sleep(5 if is_remote(sweep.folder) else 0.5)
                ended = {slot: job for slot, job in running.items() if job.finished()}
                outcomes |= {job.cell.name: job.outcome for job in ended.values()}
                running = {slot: job for slot, job in running.items() if slot not in ended}
            if signals:
                name = signal.Signals(signals[0]).name
                say(f"\n{name}: waiting for the cells to save and stop; repeat the signal to kill them")
                raise KeyboardInterrupt
            status.show([sweep.row(cell) for cell in sweep.cells])
        finally:
            _end([job.process for job in running.values()], signals)
            for job in running.values():
                if not job.outcome:
                    job.record_stop()
    return outcomes


def check_outcomes(sweep: Sweep, outcomes: Mapping[str, dict]) -> None:
    """Raises `UserError` with the reason of the first cell if all cells that ran have failed."""
    if not outcomes or any(outcome["status"] != "failed" for outcome in outcomes.values()):
        return
    first = next(cell for cell in sweep.cells if cell.name in outcomes)
    reason = outcomes[first.name]["reason"].removeprefix("error: ")
    count = f"all {len(outcomes)} cells" if len(outcomes) > 1 else "the one cell"
    raise UserError(f"{count} that ran failed; {first.name}: {reason} (see {log_file(sweep, first)})")


@contextlib.contextmanager
def _record_signals() -> Iterator[list[int]]:
    """Collects stop signals in a list, in order of arrival.

    An exception raised at an arbitrary point could lose track of a process that was just started.
    """
    noted: list[int] = []
    # nohup ignores signals.
    handled = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in handled}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(processes: Sequence[subprocess.Popen], signals: list[int]) -> None:
    """Asks processes to save and exit; a second signal kills the processes that are still running."""
    for process in processes:
        process.terminate()
    known = len(signals)
    while any(process.poll() is None for process in processes):
        if len(signals) > known:
            for process in processes:
                process.kill()
        time.sleep(0.1)


def _clear(folder: epath.Path) -> None:
    """Deletes the outcome of an earlier attempt, and the folder if it is then empty."""
    retry(lambda: (folder / CELL).unlink(missing_ok=True), folder)
    if not is_remote(folder):
        with contextlib.suppress(OSError):  # the folder is not empty or does not exist
            os.rmdir(folder)  # `epath.Path.rmdir` would delete files such as "notes~"
