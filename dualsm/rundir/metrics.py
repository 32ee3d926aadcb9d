"""Where the numbers go: `metrics.jsonl`, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import os
import time

import ml_collections
from etils import epath

from dualsm.process.errors import UserError
from dualsm.process.output import write_atomically
from dualsm.process.progress import warn
from dualsm.rundir import trackers as boards

METRICS = "metrics.jsonl"


def read_metrics(workdir: epath.PathLike) -> list[dict]:
    """The log lines of a run, in order; [] when there are none. A torn last line is left out.

    Raises:
      UserError: for a line before it that is damaged.
    """
    path = epath.Path(workdir) / METRICS
    if not path.exists():
        return []
    lines, records = path.read_bytes().split(b"\n")[:-1], []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}, is damaged: {error}") from error
        if not isinstance(records[-1], dict) or type(records[-1].get("step")) is not int:
            raise UserError(f"{path}, line {number}, is damaged: it is no object with a step")
    return records


class MetricsWriter:
    """Writes one object a log line, each step once, however often the run was killed."""

    def __init__(self, workdir: epath.PathLike, config: ml_collections.ConfigDict, resumed_at: int | None):
        """
        Args:
          workdir: of the run.
          config: the run's config.
          resumed_at: the step whose checkpoint the run goes on from; lines after it are taken back. None
            takes back all.
        """
        path = epath.Path(workdir) / METRICS
        kept = [r for r in read_metrics(workdir) if resumed_at is not None and r["step"] <= resumed_at]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, text)
        self._lines = _ObjectFile(path, text) if "://" in str(path) else _File(path)
        self._boards = []
        if config.log.tensorboard:
            self._boards.append(boards.tensorboard(workdir, config, resumed_at))
        if config.log.wandb:
            self._boards.append(boards.wandb(workdir, config))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends the line of `step`. A line that cannot be written now is kept and tried again."""
        try:
            self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            warn(f"step {step}: metrics cannot be written ({error}) and are kept until they can")
        for board in self._boards:
            board(step, metrics)

    def sync(self) -> None:
        """Returns when all lines are on disk, or in their bucket. Raises OSError when they cannot be."""
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()
        for board in self._boards:
            board(None, {})


class NoMetrics:
    """Stands for a `MetricsWriter` in processes that write nothing."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class _File:
    """A file of whole lines, also on a disk that is full for a while."""

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
        """Writes what is unwritten, all of it or nothing."""
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
    """A text file in object storage, where nothing can be appended: written whole, now and then."""

    SECONDS = 10  # between writes, unless asked to

    def __init__(self, path: epath.Path, text: str):
        self._path, self._text, self._uploaded = path, text, time.monotonic()

    def write(self, line: str) -> None:
        self._text += line
        if time.monotonic() - self._uploaded > self.SECONDS:
            self.sync()

    def sync(self) -> None:
        self._path.write_text(self._text)
        self._uploaded = time.monotonic()

    def close(self) -> None:
        self.sync()
