"""Log lines of a run: numbers for the metrics file and trackers, and text for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from dualsm.devices.chips import Peak
from dualsm.objectives.plan import MixturePlan
from dualsm.process.progress import say
from dualsm.rundir.metrics import MetricsWriter, NoMetrics
from dualsm.training.clock import Clock, Interval
from dualsm.training.step_metrics import StepMetrics


class MetricsLog:
    """Formats and writes log lines, and measures the time between them.

    Attributes:
      clock: time since the last log line.
    """

    def __init__(
        self,
        config: ConfigDict,
        plan: MixturePlan,
        schedule: optax.Schedule,
        unique_O: Sequence[int],
        peak: Peak,
        flops_J: np.ndarray,
        writer: MetricsWriter | NoMetrics,
    ):
        """
        Args:
          config: the run's config.
          plan: objectives and sequences of the run.
          schedule: learning rate by step.
          unique_O: unique tokens of each source.
          peak: peak performance of all devices.
          flops_J: floating-point operations of a train step per row of each member of the mixture.
          writer: destination of the metrics.
        """
        self._config, self._plan, self._schedule = config, plan, schedule
        self._names = list(dict.fromkeys(member.name for member in plan.members))
        self._unique_O, self._peak, self._flops_J = unique_O, peak, flops_J
        self._writer, self._deferred, self._interval = writer, None, None
        self.clock = Clock()

    def defer(self, step: int, metrics: StepMetrics) -> None:
        """Leaves the line of a step to the next `flush`."""
        self._deferred = (step, metrics)

    def end_interval(self) -> None:
        """Ends the interval of the deferred line, if there is one; called when its step has been computed."""
        if self._deferred:
            self._interval = self.clock.interval()

    def flush(self, progress) -> None:
        """Writes the deferred line, if there is one."""
        if self._deferred:
            (step, metrics), self._deferred = self._deferred, None
            self.write(step, metrics, {}, progress, self._interval)

    def write(
        self,
        step: int,
        metrics: StepMetrics | None,
        scores: dict[str, float],
        progress,
        interval: Interval | None = None,
    ) -> None:
        """Writes the line of a step.

        Args:
          step: number of finished steps.
          metrics: metrics since the last log line; None if the step is not logged.
          scores: metrics of the validation after the step; empty if there was none.
          progress: progress bar.
          interval: time since the last log line; None if it ends now.
        """
        record = self._position(step)
        if metrics is not None:
            record |= self._train_metrics(jax.device_get(metrics), step)
            record |= self._perf_metrics(step, interval or self.clock.interval())
            say(_train_line(step, self._config.steps, record, self._names))
            progress.set_postfix_str(f"loss {record.get('train/loss', math.nan):.3f}", refresh=False)
        if scores:
            say(_valid_line(step, self._config.steps, scores))
        self._writer.write(step, record | scores)

    def write_first(self, step: int, metrics: StepMetrics, scores: dict[str, float]) -> None:
        """Writes the line of a validation before training starts or resumes at `step`."""
        record, config = self._position(step), self._config
        if step and (step == config.steps or step % config.log.every == 0):
            record |= self._train_metrics(jax.device_get(metrics), step)
        self._writer.write(step, record | scores)
        say(_valid_line(step, config.steps, scores))

    def sync(self) -> None:
        """Returns when all lines are on disk; raises OSError if they cannot be written."""
        self._writer.sync()

    def _position(self, step: int) -> dict[str, float]:
        tokens = self._plan.sequences(step) * self._config.seq_len
        record = {"tokens": tokens, "epoch": tokens / sum(self._unique_O), "flops": self._flops(step)}
        sequences_O = self._plan.source_sequences(step)
        for source, sequences, unique in zip(self._plan.sources, sequences_O, self._unique_O, strict=True):
            if source.name:
                record[f"epoch/{source.name}"] = sequences * self._config.seq_len / unique
        return record

    def _flops(self, step: int) -> float:
        """Returns the floating-point operations of the first `step` steps."""
        return float(self._plan.member_rows(step) @ self._flops_J)

    def _train_metrics(self, metrics: StepMetrics, step: int) -> dict[str, float]:
        record = {"train/skipped": float(metrics.skipped)} if metrics.skipped else {}
        if not metrics.steps:
            return record
        record["train/loss"] = float(metrics.loss / max(metrics.weight, 1))
        record |= self._losses(metrics)
        record["train/gradient_norm"] = float(metrics.gradient_norm / metrics.steps)
        record["train/learning_rate"] = float(self._schedule(step - 1))
        return record

    def _losses(self, metrics: StepMetrics) -> dict[str, float]:
        """Returns the losses of each member over all sources, then those of each source with a name."""
        by_name: dict[str, tuple] = {}
        plan = self._plan
        for member, source, nll, tokens in zip(
            plan.members, plan.member_sources, metrics.nll_J, metrics.loss_denominator_J, strict=True
        ):
            for name in dict.fromkeys((member.name, f"{source}/{member.name}".lstrip("/"))):
                total, denominator = by_name.get(name, (0, 0))
                by_name[name] = (total + nll, denominator + tokens)
        names = sorted(by_name, key=lambda name: name not in self._names)
        return {
            f"train/{name}/loss": float(nll / tokens)
            for name, (nll, tokens) in ((name, by_name[name]) for name in names)
            if tokens
        }

    def _perf_metrics(self, step: int, interval: Interval) -> dict[str, float]:
        first = step - interval.steps
        sequences = self._plan.sequences(step) - self._plan.sequences(first)
        return {
            "perf/tokens_per_second": sequences * self._config.seq_len / interval.seconds,
            "perf/mfu": self._peak.utilization((self._flops(step) - self._flops(first)) / interval.seconds),
            "perf/data_wait_fraction": interval.waiting / interval.seconds,
            "perf/checkpoint_seconds": interval.saving,
        }


def _train_line(done: int, steps: int, record: dict, names: list[str]) -> str:
    losses = "  ".join(f"{n} {record[f'train/{n}/loss']:.3f}" for n in names if f"train/{n}/loss" in record)
    epochs = "".join(
        f"{name.removeprefix('epoch/')} epoch {value:.2f}  "
        for name, value in record.items()
        if name.startswith("epoch/")
    )
    return (
        f"step {done:>{len(str(steps))}}/{steps}  {losses or 'all updates skipped'}  {epochs}"
        f"lr {record.get('train/learning_rate', math.nan):.2g}  "
        f"{record['perf/tokens_per_second']:,.0f} tokens/s  mfu {record['perf/mfu']:.0%}"
    )


def _valid_line(done: int, steps: int, scores: dict) -> str:
    bits = "  ".join(
        f"{name.removeprefix('valid/').removesuffix('/bits_per_byte')} {value:.3f}"
        for name, value in scores.items()
        if name.endswith("bits_per_byte")
    )
    return f"step {done:>{len(str(steps))}}/{steps}  held out, bits per byte:  {bits}"
