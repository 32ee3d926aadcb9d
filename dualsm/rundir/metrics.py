"""Metrics of a run: `metrics.jsonl`, and the experiment trackers."""

from __future__ import annotations

import json
import os
import time

import ml_collections
from etils import epath

from dualsm.process.errors import UserError
from dualsm.process.output import write_atomically
from dualsm.process.paths import is_remote, user_path, write_object
from dualsm.process.progress import warn
from dualsm.rundir import trackers

METRICS = "metrics.jsonl"


def read_metrics(workdir: epath.PathLike) -> list[dict]:
    """Reads the log lines of a run, without an incomplete last line; returns [] if there are none.

    Raises:
      UserError: if another line is damaged.
    """
    path = user_path(workdir) / METRICS
    if not path.exists():
        return []
    lines, records = path.read_bytes().split(b"\n")[:-1], []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}, is damaged: {error}; remove the line") from error
        if not isinstance(records[-1], dict) or type(records[-1].get("step")) is not int:
            raise UserError(
                f"{path}, line {number}, is damaged: it is not an object with a step; remove the line"
            )
    return records


class MetricsWriter:
    """Writes log lines to `metrics.jsonl` and the trackers; each step has one line, also after a kill."""

    def __init__(self, workdir: epath.PathLike, config: ml_collections.ConfigDict, resumed_at: int | None):
        """
        Args:
          workdir: the run directory.
          config: the run's config.
          resumed_at: step of the checkpoint that the run resumes from; later lines are deleted. None deletes
            all lines.
        """
        path = user_path(workdir) / METRICS
        kept = [r for r in read_metrics(workdir) if resumed_at is not None and r["step"] <= resumed_at]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, text)
        self._lines = _ObjectFile(path, text) if is_remote(path) else _File(path)
        self._trackers = []
        if config.log.tensorboard:
            self._trackers.append(trackers.tensorboard(workdir, config, resumed_at))
        if config.log.wandb:
            self._trackers.append(trackers.wandb(workdir, config))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends the line of a step. If this fails, the line is written with a later one."""
        try:
            self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            warn(f"step {step}: cannot write the metrics ({error}); they are kept in memory and retried")
        for tracker in self._trackers:
            tracker(step, metrics)

    def sync(self) -> None:
        """Returns when all lines are on disk or in the bucket; raises OSError if they cannot be written."""
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()
        for tracker in self._trackers:
            tracker(None, {})


class NoMetrics:
    """Replaces `MetricsWriter` in processes other than the main process; writes nothing."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class _File:
    """A local file to which only complete lines are appended, also if the disk is full for a while."""

    def __init__(self, path: epath.Path):
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._size = os.fstat(self._file.fileno()).st_size
        self._unwritten = b""

    def write(self, line: str) -> None:
        self._unwritten += line.encode()
        self._push()

    def sync(self) -> None:
        self._push()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self._push()
        finally:
            self._file.close()

    def _push(self) -> None:
        """Writes all unwritten lines, or none if the disk is full."""
        size = self._size + len(self._unwritten)
        try:
            while self._unwritten and self._file.tell() < size:
                self._file.write(self._unwritten[self._file.tell() - size :])
        except OSError:
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise
        self._size, self._unwritten = size, b""


class _ObjectFile:
    """A text file in an object store; uploaded as a whole, because objects cannot be appended to."""

    SECONDS = 10  # minimum time between attempts to upload, except by `sync`

    def __init__(self, path: epath.Path, text: str):
        self._path, self._text, self._last_attempt = path, text, time.monotonic()

    def write(self, line: str) -> None:
        """Adds a line; uploads all lines if the last attempt is long enough ago, without retries."""
        self._text += line
        if time.monotonic() - self._last_attempt > self.SECONDS:
            self._upload(attempts=1)  # training waits for it

    def sync(self) -> None:
        self._upload()

    def close(self) -> None:
        self.sync()

    def _upload(self, **options: int) -> None:
        try:
            write_object(self._path, self._text.encode(), **options)
        finally:
            self._last_attempt = time.monotonic()
