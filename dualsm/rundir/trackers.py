"""Experiment trackers: TensorBoard and Weights & Biases.

A tracker that fails (full disk, lost connection) is disabled with one warning; training continues.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import ml_collections
from etils import epath
from flax.traverse_util import flatten_dict

from dualsm.process.paths import is_remote, user_path
from dualsm.process.progress import warn

# Logs metrics (name -> value) of a step; a step of None closes the tracker.
Log = Callable[[int | None, dict[str, float]], None]

TENSORBOARD = "tensorboard"  # folder
WANDB_ID = "wandb_id"
CLOSE_SECONDS = 60  # timeout of the last upload
_UPLOAD_SECONDS = 10  # minimum time between uploads of the event file to a bucket


class Tracker:
    """A `Log` function that never raises: the first failure disables it with a warning."""

    def __init__(self, name: str, start: Callable[[], Log]):
        """
        Args:
          name: name of the tracker, for warnings.
          start: starts the tracker and returns its `Log` function.
        """
        self._name, self._log = name, None
        with self._disabled_on_failure():
            self._log = start()

    def __call__(self, step: int | None, metrics: dict[str, float]) -> None:
        if self._log and step is None:
            self._close(self._log)
        elif self._log:
            with self._disabled_on_failure():
                self._log(step, metrics)

    def _close(self, log: Log) -> None:
        """Closes the tracker, for at most `CLOSE_SECONDS`, because a preempted job has little time."""

        def close() -> None:
            with self._disabled_on_failure():
                log(None, {})

        thread = threading.Thread(target=close, daemon=True)
        thread.start()
        thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            warn(f"{self._name} did not close within {CLOSE_SECONDS} s; the rest of its data is only on disk")

    @contextlib.contextmanager
    def _disabled_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no failure of a tracker may stop training
            self._log = None
            text = " ".join(str(error).split())
            warn(f"{self._name} failed and is disabled for this run: {type(error).__name__}: {text}")


def tensorboard(
    workdir: epath.PathLike, config: ml_collections.ConfigDict, resumed_at: int | None
) -> Tracker:
    """Starts TensorBoard event files in `workdir/tensorboard`, with all config values as hyperparameters.

    Args:
      workdir: the run directory.
      config: the run's config.
      resumed_at: step that the run resumes from; TensorBoard hides later events of earlier processes. None
        hides all of them.
    """
    return Tracker("TensorBoard", lambda: _tensorboard(workdir, config, resumed_at))


def wandb(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> Tracker:
    """Starts or resumes a run in the Weights & Biases project `config.log.wandb`.

    The W&B run has the name of the run directory and the values of the config. Its id is stored in the run
    directory. The environment variables of W&B, such as WANDB_MODE and WANDB_RUN_GROUP, apply.
    """
    return Tracker("Weights & Biases", lambda: _wandb(workdir, config))


def _tensorboard(workdir, config, resumed_at) -> Log:
    # tensorboardX's SummaryWriter writes from a thread with a queue of ten events. When a full disk ends that
    # thread, the next calls block forever. The classes used here write immediately or raise.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import directory_check
    from tensorboardX.summary import hparams

    folder, first = str(user_path(workdir) / TENSORBOARD), 0 if resumed_at is None else resumed_at + 1
    directory_check(folder)
    writer = EventsWriter(f"{folder}/events", filename_suffix=f".{first}")
    wait, flushed = _UPLOAD_SECONDS if is_remote(folder) else 0, float("-inf")

    def add(step: int, **fields) -> None:
        nonlocal flushed
        writer.write_event(Event(wall_time=time.time(), step=step, **fields))
        if time.monotonic() - flushed >= wait:
            writer.flush()
            flushed = time.monotonic()

    def log(step: int | None, metrics: dict[str, float]) -> None:
        if step is None:
            writer.close()
        else:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
            add(step, summary=Summary(value=values))

    # TensorBoard hides events of earlier sessions from the first step of a new session on.
    add(first, session_log=SessionLog(status=SessionLog.START))
    # Without an experiment summary TensorBoard compares all hyperparameters of all runs.
    _, session, _ = hparams(flatten_dict(config.to_dict(), sep="."), {})
    add(first, summary=session)
    return log


def _wandb(workdir, config) -> Log:
    import wandb as client

    workdir = user_path(workdir)
    run = client.init(
        project=config.log.wandb,
        id=_wandb_id(workdir),
        name=workdir.name,
        resume="allow",
        dir=None if is_remote(workdir) else str(workdir),
        config=config.to_dict(),
    )

    def log(step: int | None, metrics: dict[str, float]) -> None:
        if step is None:
            run.finish()
        else:
            run.log(metrics, step=step)

    return log


def _wandb_id(workdir: epath.Path) -> str:
    """Returns the W&B id of the run, which is created at the first start."""
    path = workdir / WANDB_ID
    run_id = path.read_text().strip() if path.exists() else ""
    if not run_id:
        run_id = uuid.uuid4().hex[:8]
        path.write_text(run_id + "\n")
    return run_id
