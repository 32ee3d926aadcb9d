"""Where the numbers go: `metrics.jsonl`, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_collections

METRICS = "metrics.jsonl"


def read_metrics(workdir: str | Path) -> list[dict]:
    """The log lines of a run, in order; [] when there are none. A torn last line is left out."""
    path = Path(workdir) / METRICS
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


class MetricsWriter:
    """Writes one object a log line, each step once, however often the run was killed."""

    def __init__(self, workdir: str | Path, config: ml_collections.ConfigDict, resumed_at: int | None):
        """
        Args:
          workdir: of the run.
          config: the run's config.
          resumed_at: the step whose checkpoint the run goes on from; lines after it are taken back. None
            takes back all.
        """
        self._path = Path(workdir) / METRICS
        kept = [r for r in read_metrics(workdir) if resumed_at is not None and r["step"] <= resumed_at]
        aside = self._path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        aside.replace(self._path)
        self._file = self._path.open("a")
        self._boards = []
        if config.log.tensorboard:
            self._boards.append(_tensorboard(workdir, resumed_at))
        if config.log.wandb:
            self._boards.append(_wandb(workdir, config))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends the line of `step`."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for board in self._boards:
            board(step, metrics)

    def sync(self) -> None:
        """Returns when all lines are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        for board in self._boards:
            board(None, {})


def _tensorboard(workdir, resumed_at):
    from tensorboardX import SummaryWriter

    # Events after the checkpoint that was resumed from are hidden by `purge_step`.
    purge = None if resumed_at is None else resumed_at + 1
    writer = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=purge)

    def write(step, metrics):
        if step is None:
            return writer.close()
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        return writer.flush()

    return write


def _wandb(workdir, config):
    import wandb

    name = Path(workdir).name
    run = wandb.init(
        project=config.log.wandb,
        name=name,
        id=name,
        resume="allow",
        dir=str(workdir),
        config=config.to_dict(),
    )

    def write(step, metrics):
        if step is None:
            run.finish()
        else:
            run.log(metrics, step=step)

    return write
