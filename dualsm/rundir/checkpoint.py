"""Orbax checkpoints of the train state."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import ml_collections
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dualsm.process import distributed
from dualsm.process.errors import UserError
from dualsm.process.paths import is_remote, retry, user_path
from dualsm.process.progress import warn
from dualsm.rundir import checksums
from dualsm.rundir.checkpoint_folder import LATEST, checkpoints_folder
from dualsm.rundir.checkpoint_metadata import CHECKSUMS, fill_missing_fields, saved_part, verify
from dualsm.rundir.save_barrier import SaveBarrier, align_operations

_READS = 4  # attempts to read a checkpoint in a bucket before it counts as damaged
_MAX_PAUSE = 60  # seconds between a failed save during training and its retry


class Checkpoints:
    """Saves and restores the checkpoints of a run; saves are atomic and run in the background.

    A failed save does not end the run: the processes of a job agree on the failure and continue. During
    training a failed save is retried after 1, 2, 4, ... seconds with the train state at that time
    (`repeat_due`). At the end of a run `finish` waits for the retries.
    """

    def __init__(
        self, workdir: epath.PathLike, config: ml_collections.ConfigDict, kept_steps: Iterable[int] = ()
    ):
        """
        Args:
          workdir: the run directory.
          config: `config.checkpoint`.
          kept_steps: steps whose checkpoints are never deleted.
        """
        self._config, self._kept_steps = config, tuple(kept_steps)
        self._folder, self._latest = checkpoints_folder(workdir), user_path(workdir) / LATEST
        self._damaged: set[int] = set()  # on disk, skipped by `restore`
        self._writing: int | None = None
        self._repeats = False  # the save in the background is a retry
        self._failed: list[int] = []  # steps of consecutive failed saves, without retries
        self._attempts, self._next_attempt = 0, 0.0  # consecutive failures with retries; time of the next
        self._lost = False  # True while the folder does not exist or cannot be opened
        self._opened = 0
        self._manager = retry(self._open_together, self._folder)

    def _open_together(self) -> ocp.CheckpointManager:
        with distributed.together():
            return self._open()

    def _open(self) -> ocp.CheckpointManager:
        self._opened += 1
        self._barrier = SaveBarrier(self._opened)
        align_operations()
        with self._barrier.replaces_orbax():
            return self._new_manager()

    def _new_manager(self) -> ocp.CheckpointManager:
        keep = [policies.LatestN(self._config.max_to_keep), policies.CustomSteps(self._kept_steps)]
        if self._config.keep_period:
            keep.append(policies.EveryNSteps(self._config.keep_period))
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                save_decision_policy=policies.FixedIntervalPolicy(1),
                async_options=ocp.AsyncOptions(barrier_sync_fn=self._barrier),
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # reads metadata at restore, which skips damaged checkpoints
            ),
        )

    def save(
        self,
        step: int,
        state,
        before: Callable[[], None] = lambda: None,
        last: bool = False,
        repeats: bool = False,
    ) -> None:
        """Starts to write `state`; returns when the arrays may be donated again.

        Deletes the damaged checkpoints that `restore` skipped.

        Args:
          step: step of the state.
          state: tree of arrays.
          before: called before the checkpoint is written, to write files that must not be older than the
            checkpoint. If it raises OSError, the save has failed.
          last: True if the run ends with this checkpoint; `finish` retries a failed last save.
          repeats: True if this call retries a failed save; then a failure does not count as another one.

        Raises:
          UserError: after more than `max_failed_saves` consecutive failures. Earlier failures are warnings.
        """
        self._wait(last)
        with self._report_failure(step, last, repeats):
            sums = checksums.start_checksums(state)  # computed while the disk is probed
            with distributed.together():
                before()
                self._probe()
            if self._lost:
                self._reopen()
            if self._lost:
                raise FileNotFoundError(f"the folder {self._folder} cannot be opened")
            save, metadata = ocp.args.StandardSave(state), {CHECKSUMS: sums()}
            with distributed.together(), self._barrier.replaces_orbax():
                # Orbax does not save steps before its latest one, and counts damaged ones in max_to_keep.
                for damaged in sorted(self._damaged.intersection(self._manager.all_steps())):
                    self._manager.delete(damaged)
                if not self._manager.save(step, args=save, custom_metadata=metadata):
                    raise FileExistsError(
                        f"a checkpoint of step {self._manager.latest_step()} already exists"
                    )
            self._damaged.clear()
            self._writing, self._repeats = step, repeats

    def repeat_due(self, step: int) -> bool:
        """Returns True if a failed save should be retried after this step; the same in all processes.

        Must be called after every step. Checks the save in the background 1, 2, 4, ... steps after its start.
        """
        if self._writing is not None and _is_power_of_two(step - self._writing):
            ended = self._barrier.broken or not self._manager.is_saving_in_progress()
            if distributed.any_process(ended):
                self._wait()
        if not self._attempts:
            return False
        due = distributed.is_main_process() and time.monotonic() >= self._next_attempt
        return distributed.any_process(due)

    def _probe(self) -> None:
        """Raises OSError if the folder is not writable; Orbax's threads would wait for minutes instead."""
        if distributed.is_main_process():
            probe = self._folder / ".probe"
            probe.write_bytes(b"x" * 4096)
            probe.unlink(missing_ok=True)

    def finish(self, again: Callable[[], None] = lambda: None) -> None:
        """Waits for the last save and repeats a failed one after 1, 2, 4, ... seconds.

        Args:
          again: repeats the save.

        Raises:
          UserError: after `final_retries` failed retries.
        """
        self._wait(last=True)
        for attempt in range(self._config.final_retries):
            if not self._failed:
                return
            time.sleep(2**attempt)
            again()
            self._wait(last=True)
        if self._failed:
            raise UserError(
                f"the checkpoint of step {self._failed[-1]} could not be saved; {self._how_to_resume()}"
            )

    def _wait(self, last: bool = False) -> None:
        """Waits for the save in the background."""
        step, self._writing = self._writing, None
        if step is not None:
            with self._report_failure(step, last, self._repeats):
                with distributed.together():
                    self._manager.wait_until_finished()
                self._failed, self._attempts = [], 0
                self._write_latest(step)

    def _write_latest(self, step: int) -> None:
        """Writes the file `LATEST`."""
        if distributed.is_main_process():
            # A run can continue without this file; clients of buckets raise various errors.
            with contextlib.suppress(Exception):
                self._latest.write_text(f"{step}\n")

    @contextlib.contextmanager
    def _report_failure(self, step: int, last: bool, repeats: bool) -> Iterator[None]:
        """Turns any exception inside the context into a warning that the save of `step` has failed.

        In a job of several processes all of them must have agreed on the exception, see `together`.

        Raises:
          UserError: after too many consecutive failures.
        """
        try:
            yield
        except Exception as error:  # a full disk or a lost mount raises various errors
            if last or not repeats:
                self._failed.append(step)
            count, allowed = len(self._failed), self._config.max_failed_saves
            pause = min(2**self._attempts, _MAX_PAUSE)
            self._attempts, self._next_attempt = self._attempts + 1, time.monotonic() + pause
            if count > allowed and not last:
                raise UserError(
                    f"the checkpoint of step {step} could not be saved ({error_reason(error)}), {count} "
                    f"consecutive failures; {self._how_to_resume()}"
                ) from error
            next_ = f"training continues; the next attempt is in {pause} s; {allowed - count} more may fail"
            warn(
                f"the checkpoint of step {step} could not be saved ({error_reason(error)}); "
                f"{'retrying' if last else next_} "
                f"(config.checkpoint.{'final_retries' if last else 'max_failed_saves'})"
            )
            if step in self._kept_steps and not last:
                warn(
                    f"step {step} is a milestone of config.checkpoint.at_words; later attempts save later "
                    "steps, so its checkpoint will be missing"
                )
            with contextlib.suppress(Exception):
                self._manager.close()
            self._reopen()

    def _reopen(self) -> None:
        """Opens a new manager, which removes partially written checkpoints.

        If the folder does not exist, because its disk was unmounted, no manager is opened until the folder is
        back: a new manager would create the folder on the disk below the mount point.
        """
        vanished = not is_remote(self._folder) and not self._folder.is_dir()  # buckets have no folders
        self._lost = distributed.any_process(vanished)
        if not self._lost:
            try:
                self._manager = self._open_together()
            except Exception:  # the next save tries again
                self._lost = True

    def _how_to_resume(self) -> str:
        newest = self.newest()
        return f"free disk space or repair {self._folder}, then run the same command to resume " + (
            f"from step {newest}" if newest else "from the start"
        )

    def restore(self, abstract_state):
        """Returns the state of the newest intact checkpoint, or None if the run has no checkpoints.

        Checkpoints that cannot be read, or whose checksums have changed, are skipped with a warning. Fields
        that a checkpoint of weights only lacks are None.

        Args:
          abstract_state: tree of shapes, dtypes and shardings.

        Raises:
          UserError: if the run has checkpoints but none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            for attempt in range(_READS if is_remote(self._folder) else 1):
                time.sleep(attempt and 2**attempt)
                state, reason = self._read(step, abstract_state)
                if distributed.all_agree(state is not None):
                    self._write_latest(step)
                    return state
            self._damaged.add(step)
            warn(f"skipped the damaged checkpoint {self._folder / str(step)}: {reason}")
        if steps:
            raise UserError(
                f"none of the checkpoints in {self._folder} can be read; restore a backup or choose another "
                "--workdir"
            )
        return None

    def _read(self, step: int, abstract_state) -> tuple:
        """Returns the state of a checkpoint, or None, and the reason why it cannot be read."""
        try:
            wanted = saved_part(self._manager, step, abstract_state)
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
            verify(self._manager, step, restored)
            return fill_missing_fields(abstract_state, restored), "another process could not read it"
        except Exception as error:  # damaged files raise various errors
            return None, error_reason(error)

    def newest(self) -> int:
        """Returns the step of the newest checkpoint that is not known to be damaged, or 0."""
        return max(set(self._manager.all_steps()) - set(self._failed) - self._damaged, default=0)

    def close(self) -> None:
        """Waits for the save in the background."""
        with contextlib.suppress(Exception):  # failed saves are reported elsewhere
            self._manager.close()


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def error_reason(error: Exception) -> str:
    """Returns the first line of an error message, without the settings that tensorstore appends."""
    return (str(error).splitlines() or [type(error).__name__])[0].partition(" [tensorstore_spec")[0]


def abstract(tree, shardings):
    """Returns the shapes, dtypes and shardings of a tree, an argument of the restore functions."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
