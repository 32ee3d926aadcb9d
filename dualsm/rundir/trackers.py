"""Boards on which a run can be watched: TensorBoard and Weights & Biases.

Training can do without them: a board that fails (a full disk, a lost connection) is dropped with one warning.
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

from dualsm.process.progress import warn

# Shows metrics (name -> value) at a step; a step of None means that no more will come.
Show = Callable[[int | None, dict[str, float]], None]

TENSORBOARD = "tensorboard"  # folder
WANDB_ID = "wandb_id"
CLOSE_SECONDS = 60  # for the last upload
_UPLOAD_SECONDS = 10  # between uploads of events to a bucket, where a file is written whole


class Board:
    """A `Show` that is dropped, with one warning, when it fails; never raises."""

    def __init__(self, name: str, start: Callable[[], Show]):
        self._name, self._show = name, None
        with self._dropped_on_failure():
            self._show = start()

    def __call__(self, step: int | None, metrics: dict[str, float]) -> None:
        if self._show and step is None:
            self._close(self._show)
        elif self._show:
            with self._dropped_on_failure():
                self._show(step, metrics)

    def _close(self, show: Show) -> None:
        """Closes within `CLOSE_SECONDS`: a preempted job has little time, and its processes wait here."""

        def close() -> None:
            with self._dropped_on_failure():
                show(None, {})

        thread = threading.Thread(target=close, daemon=True)
        thread.start()
        thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            warn(f"{self._name} has not closed within {CLOSE_SECONDS} s; data not uploaded stays on disk")

    @contextlib.contextmanager
    def _dropped_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, it is no reason to stop training
            self._show = None
            text = " ".join(str(error).split())
            warn(f"{self._name} fails and is shown no more of this run: {type(error).__name__}: {text}")


def tensorboard(workdir: epath.PathLike, config: ml_collections.ConfigDict, resumed_at: int | None) -> Board:
    """Event files in `workdir/tensorboard`: the metrics, and all config values as hyperparameters.

    Args:
      workdir: of the run.
      config: the run's config.
      resumed_at: the step that the run goes on from; what was shown of later ones is taken back. None: all.
    """
    return Board("TensorBoard", lambda: _tensorboard(workdir, config, resumed_at))


def wandb(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> Board:
    """A run of the W&B project `config.log.wandb`, with the config; it is named like the workdir.

    What W&B reads from the environment holds (WANDB_MODE, WANDB_RUN_GROUP, ...). The run's id lies in the
    workdir, so that a resumed run is gone on with and two of the same name are not mixed up.
    """
    return Board("Weights & Biases", lambda: _wandb(workdir, config))


def _tensorboard(workdir, config, resumed_at) -> Show:
    # Not by tensorboardX's SummaryWriter: it writes from a thread behind a queue of ten events, and when
    # that thread dies of a full disk the next calls wait for ever. Its parts write at once or raise.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import directory_check
    from tensorboardX.summary import hparams

    folder, first = str(epath.Path(workdir) / TENSORBOARD), 0 if resumed_at is None else resumed_at + 1
    directory_check(folder)
    writer = EventsWriter(f"{folder}/events", filename_suffix=f".{first}")
    wait, flushed = _UPLOAD_SECONDS if "://" in folder else 0, float("-inf")

    def add(step: int, **what) -> None:
        nonlocal flushed
        writer.write_event(Event(wall_time=time.time(), step=step, **what))
        if time.monotonic() - flushed >= wait:
            writer.flush()
            flushed = time.monotonic()

    def show(step: int | None, metrics: dict[str, float]) -> None:
        if step is None:
            writer.close()
        else:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
            add(step, summary=Summary(value=values))

    # The start of a session hides what earlier ones wrote from its step on.
    add(first, session_log=SessionLog(status=SessionLog.START))
    # Without the summary of an experiment TensorBoard compares all runs it finds by all their values.
    _, session, _ = hparams(flatten_dict(config.to_dict(), sep="."), {})
    add(first, summary=session)
    return show


def _wandb(workdir, config) -> Show:
    import wandb as client

    workdir = epath.Path(workdir)
    run = client.init(
        project=config.log.wandb,
        id=_wandb_id(workdir),
        name=workdir.name,
        resume="allow",
        dir=None if "://" in str(workdir) else str(workdir),
        config=config.to_dict(),
    )

    def show(step: int | None, metrics: dict[str, float]) -> None:
        if step is None:
            run.finish()
        else:
            run.log(metrics, step=step)

    return show


def _wandb_id(workdir: epath.Path) -> str:
    """The id of the workdir's run, chosen when there is none."""
    path = workdir / WANDB_ID
    known = path.read_text().strip() if path.exists() else ""
    if not known:
        known = uuid.uuid4().hex[:8]
        path.write_text(known + "\n")
    return known
