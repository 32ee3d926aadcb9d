"""The training loop: for each step, read a batch, update the state, and log, validate or save if due.

A run is a function of its config. Only the `TrainState` is carried from step to step, and batches are
addressed by step, so that a resumed run is identical to an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dualsm import config as configs
from dualsm.data.batches import BatchSource, read_batches
from dualsm.devices import sharding
from dualsm.devices.chips import Peak
from dualsm.model.flops import train_flops
from dualsm.objectives.plan import MixturePlan
from dualsm.optimizers.schedules import learning_rate
from dualsm.process import distributed
from dualsm.process.errors import UserError
from dualsm.process.paths import user_path
from dualsm.process.progress import bar, say, warn
from dualsm.rundir.checkpoint import Checkpoints
from dualsm.rundir.metrics import MetricsWriter, NoMetrics, read_metrics
from dualsm.rundir.milestones import all_milestones, find_milestones, write_milestones
from dualsm.training.clock import Clock
from dualsm.training.fork import forked_state, with_initial
from dualsm.training.metrics_log import MetricsLog
from dualsm.training.profile import Profiler, Window, profiled
from dualsm.training.program import attended_shares, compile_train_step
from dualsm.training.run_corpora import RunCorpus, finish_verification, order_documents
from dualsm.training.start import locked_workdir, open_job, print_start, warn_without_kernel
from dualsm.training.step import Batch, TrainState
from dualsm.training.step_metrics import StepMetrics
from dualsm.training.summary import summarize
from dualsm.training.valid_rows import INEXACT_BYTES, rows_by_source
from dualsm.training.validation import SourceValidation, Validation


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    stop: Callable[[int], bool] = lambda step: False,
    profile: Window | None = None,
) -> bool:
    """Trains a model, or resumes the run in `workdir`.

    Args:
      config: a complete config.
      workdir: the run directory; created if it does not exist.
      stop: called with the number of finished steps, after every step, before every validation batch, and
        while the run waits for the hashes of its corpora. When it returns True, the run saves a checkpoint
        and returns. In a multi-process job, the same call must return True in all processes.
      profile: steps to profile; None: no profile.

    Returns:
      True if the run is complete, False if it was stopped.

    Raises:
      UserError: if config, corpus and run directory do not fit together (before compilation), or if training
        diverges.
    """
    workdir = user_path(workdir)
    config, corpora, mesh = open_job(config, workdir)
    with distributed.together():
        run = _Run(config, workdir, corpora, mesh)
    peak = Peak(mesh.local_devices[0], mesh.size)  # processes exchange messages
    with locked_workdir(config, workdir, corpora), jax.set_mesh(mesh), profiled(profile, workdir) as profiler:
        finished = run.go(peak, stop, profiler)
    if finished and distributed.is_main_process():
        scored = [corpus for _, corpus in corpora] if run.scores_all else []
        say("\n" + summarize(workdir, scored, config.log.tensorboard))
    return finished


class _Run:
    """A run, as seen by one of its processes."""

    def __init__(
        self, config: ConfigDict, workdir: epath.Path, corpora: Sequence[RunCorpus], mesh: jax.sharding.Mesh
    ):
        self.config, self.workdir, self.corpora, self.mesh = config, workdir, corpora, mesh
        self.plan = MixturePlan(config)
        special = corpora[0].corpus.tokenizer().special
        self.ordered = order_documents(config, corpora, self.plan)
        self.batch_source = BatchSource(
            corpora=self.ordered,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            pad=special.pad,
            local_rows=sharding.process_rows(mesh, config.batch_size),
            steps=config.steps,
            row_sources=self.plan.row_sources,
        )
        self.milestones = find_milestones(config, self.plan, [corpus for _, corpus in corpora])
        self.kept = all_milestones(workdir, self.milestones)
        self.schedule = learning_rate(config.optimizer, config.steps)
        self.abstract_state, self.init, self.step = compile_train_step(config, special, mesh)

        attended_J = attended_shares(config, special)
        self.flops_J = np.array([train_flops(config.model, config.seq_len, a) for a in attended_J.tolist()])
        self.validation, self.scores_all = None, False
        if scored := configs.valid_objectives(config):
            rows = rows_by_source(corpora, config.seq_len, config.valid.num_sequences)
            if not all(part.exact for part in rows.values()) and distributed.is_main_process():
                warn(INEXACT_BYTES)
            # The gzip baseline of the summary is comparable only if all held-out documents are scored.
            self.scores_all = all(
                rows[source.name].documents_VxL1.shape[0] * config.seq_len >= corpus.tokens("valid")
                for source, corpus in corpora
            )
            self.validation = SourceValidation(
                {name: Validation(config, scored, special, part, mesh) for name, part in rows.items()}
            )

    def go(self, peak: Peak, stop: Callable[[int], bool], profiler: Profiler) -> bool:
        """Trains from the newest checkpoint until the end or until `stop`; returns True at the end."""
        with contextlib.closing(Checkpoints(self.workdir, self.config.checkpoint, self.kept)) as checkpoints:
            state = checkpoints.restore(self.abstract_state)
            resumed = state is not None
            if resumed and state.opt_state is None:  # imported weights
                parts = {"step": state.step, "params": state.params}
                state = with_initial(self.abstract_state, parts, self.init)
            if not resumed and self.config.start.run:
                state = forked_state(self.config, self.workdir, self.abstract_state, self.init)
            first = 0 if state is None else int(state.step)
            num_parameters = sum(p.size for p in jax.tree.leaves(self.abstract_state.params))
            print_start(self.config, self.mesh, self.plan, self.ordered, num_parameters)
            if first:
                start = f"resuming {self.workdir}" if resumed else f"continuing {self.config.start.run}"
                say(f"{start} at step {first} of {self.config.steps}")
            if distributed.is_main_process():
                warn_without_kernel(self.config)
            unscored = resumed and self._lacks_line(first)
            if first == self.config.steps and not unscored:
                return True
            writer = NoMetrics()
            with distributed.together():  # starting a tracker may take minutes
                if distributed.is_main_process():
                    write_milestones(self.workdir, self.kept)
                    resumed_at = first if resumed and first else None
                    writer = MetricsWriter(self.workdir, self.config, resumed_at)
            with contextlib.closing(writer):
                log = MetricsLog(
                    self.config,
                    self.plan,
                    self.schedule,
                    [order.unique for _, order in self.ordered],
                    peak,
                    self.flops_J,
                    writer,
                )
                untrained = state is None
                state = self.init() if untrained else state
                validate = unscored or (self.validation and not (resumed and first))
                if validate and not self._validate_first(state, first, log, untrained, stop):
                    return False
                return first == self.config.steps or self._train(
                    state, first, checkpoints, log, stop, profiler
                )

    def _lacks_line(self, first: int) -> bool:
        """Returns True if a line is due at step `first` and has not been written, because of a stop."""
        config = self.config
        line_due = first % config.log.every == 0  # also if `valid.every` has changed since the stop
        if not self.validation or (first % config.valid.every and first != config.steps and not line_due):
            return False
        with distributed.together():
            lines = read_metrics(self.workdir) if distributed.is_main_process() else [{"step": first}]
        return not distributed.all_agree(any(line["step"] == first for line in lines))

    def _train(
        self,
        state: TrainState,
        first: int,
        checkpoints: Checkpoints,
        log: MetricsLog,
        stop: Callable[[int], bool],
        profiler: Profiler,
    ) -> bool:
        """Trains from step `first` on; returns True if the run is complete.

        Each step runs these hooks in order: check the previous step, compute, write the previous log line,
        profile, stop, validate, log, save.
        """
        config = self.config
        batches = read_batches(
            self.batch_source, first, config.data.num_threads, config.data.prefetch_steps, self._batch
        )
        log.clock = clock = Clock()  # excludes the first validation
        metrics, quiet = None, not distributed.is_main_process()
        done, save, repeat, unscored = first, False, False, False
        with bar(total=config.steps, initial=first, desc="training", unit="step", disable=quiet) as progress:
            for done in range(first + 1, config.steps + 1):
                # Wait here, so that the duration of `next(batches)` is the time in which devices are idle.
                jax.block_until_ready(metrics)
                log.end_interval()
                self._check_step(metrics, done - 1, checkpoints)
                with clock.time("waiting"):
                    batch = next(batches)
                with jax.profiler.StepTraceAnnotation("train", step_num=done):
                    state, metrics = self.step(state, batch)
                log.flush(progress)  # while the devices work
                clock.steps += 1
                progress.update()

                profiler.after_step(done)
                stopped, last = stop(done), done == config.steps
                log_due = last or done % config.log.every == 0
                validate = self.validation and (last or done % config.valid.every == 0)
                save |= last or stopped or done % config.checkpoint.every == 0 or done in self.milestones
                repeat |= checkpoints.repeat_due(done)
                if not (validate or save or repeat):
                    if log_due:
                        log.defer(done, metrics)
                    continue
                scores = {}
                if validate:
                    scores = None if stopped else self._validate(state, metrics, done, clock, stop)
                    unscored = scores is None
                    stopped |= unscored
                    save |= stopped
                # If validation was cut short, the resumed run repeats it and writes this line.
                if (log_due or validate) and not unscored:
                    log.write(done, metrics if log_due else None, scores, progress)
                # While updates are skipped, the weights may be the cause: keep the older checkpoints.
                wanted = last or stopped or done in self.milestones
                if (save or repeat) and (wanted or not metrics.consecutive_skips):
                    with clock.time("saving"):
                        if not stopped:  # a preempted job has no time to wait
                            stopped = finish_verification(self.corpora, functools.partial(stop, done))
                            save |= stopped
                        # A checkpoint must not be newer than the metrics file.
                        checkpoints.save(done, state, before=log.sync, last=last or stopped, repeats=not save)
                    save = repeat = False
                if stopped:
                    break
        self._check_step(metrics, done, checkpoints)
        checkpoints.finish(lambda: checkpoints.save(done, state, before=log.sync, last=True))
        return done == config.steps and not unscored

    def _validate(self, state, metrics, done: int, clock, stop) -> dict[str, float] | None:
        """Returns the validation metrics after step `done`; None if the run was stopped during validation."""
        jax.block_until_ready(metrics)
        with clock.time("validating"):
            return self._scores(state, 1, functools.partial(stop, done))

    def _scores(self, state: TrainState, every: int, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Returns the validation metrics of the weights, their average, or both; None if it was stopped."""
        scores, chosen = {}, self.config.valid.parameters
        for name, prefix in (("last", "valid"), ("ema", "valid/ema")):
            if chosen in (name, "both"):
                params = state.params if name == "last" else state.ema
                found = self.validation(params, every=every, stop=stop, prefix=prefix)
                if found is None:
                    return None
                scores |= found
        return scores

    def _check_step(self, metrics: StepMetrics | None, step: int, checkpoints: Checkpoints) -> None:
        """Reports a spike or skipped update at `step`; raises `UserError` after too many skipped updates."""
        if metrics is None:
            return
        skips, spike = int(metrics.consecutive_skips), float(metrics.spike)
        if spike:
            warn(f"step {step}: loss spike, {spike:.3f} nats per token")
        if not skips:
            return
        rows = self.config.batch_size
        warn(
            f"step {step}: the loss or its gradient is not finite; skipped the update "
            f"(rows {(step - 1) * rows} to {step * rows - 1} of the run)"
        )
        if skips >= self.config.max_consecutive_skips:
            newest = checkpoints.newest()
            raise UserError(
                f"diverged: the updates of steps {step - skips + 1} to {step} were skipped because they are "
                "not finite; lower config.optimizer.learning_rate and "
                + (f"fork {self.workdir} at step {newest} (config.start)" if newest else "start a new run")
            )

    def _batch(self, element: dict[str, np.ndarray]) -> Batch:
        """Returns the batch of a step on the devices; runs in the prefetch threads."""
        objective_B, stratum_B, strata_B = self.plan.assign(element["step"])
        mine = self.batch_source.local_rows
        batch = Batch(
            element["tokens"], element["documents"], objective_B[mine], stratum_B[mine], strata_B[mine]
        )
        return jax.tree.map(lambda rows: sharding.shard_batch(self.mesh, rows, self.config.batch_size), batch)

    def _validate_first(self, state, first: int, log: MetricsLog, untrained: bool, stop) -> bool:
        """Validates before step `first + 1`; returns False if the run was stopped during validation."""
        kind = f"model of step {first}" if first else f"{'untrained' if untrained else 'imported'} model"
        say(f"compiling and validating the {kind} ...")
        # All rows have nearly the same loss under an untrained model: an eighth of them is enough.
        scores = self._scores(state, 8 if untrained else 1, lambda: stop(first))
        if scores is None:
            return False
        log.write_first(first, state.metrics, scores)
        return True
