"""Orbax checkpoints of the whole training state."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import ml_collections
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dualsm.process import distributed
from dualsm.process.errors import UserError
from dualsm.process.progress import warn
from dualsm.rundir import checksums

CHECKPOINTS = "checkpoints"
CHECKSUMS = "checksums"
LATEST = "latest_checkpoint"  # file with the step of the last whole checkpoint; tells a lost one from none


class Checkpoints:
    """The checkpoints of a run: written in the background, whole or not there at all."""

    def __init__(self, workdir: epath.PathLike, config: ml_collections.ConfigDict):
        """`config` is `config.checkpoint`."""
        self._config = config
        self._folder, self._latest = _folder(workdir), epath.Path(workdir) / LATEST
        self._damaged: set[int] = set()  # on disk, passed over by `restore`
        self._writing: int | None = None
        self._failed: list[int] = []  # steps of the saves that failed since the last good one
        self._lost = False  # whether the folder is gone
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        keep = [policies.LatestN(self._config.max_to_keep)]
        if self._config.keep_period:
            keep.append(policies.EveryNSteps(self._config.keep_period))
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                save_decision_policy=policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # damaged metadata is met at restore, where it is passed over
            ),
        )

    def save(self, step: int, state, before: Callable[[], None] = lambda: None, last: bool = False) -> None:
        """Starts writing `state`; returns when the device's memory may change again.

        Damaged checkpoints that `restore` passed over, for a whole one, are deleted before.

        Args:
          step: of the state.
          state: a tree of arrays.
          before: what must be on disk before the checkpoint is. An OSError of it is a failed save.
          last: the run ends with this one; `finish` tries it again when it failed.

        Raises:
          UserError: after more than `max_failed_saves` consecutive failures; earlier ones are reported.
        """
        self._settle(last)
        with self._reporting(step, last):
            sums = checksums.started(state)  # while the disk is waited for
            with distributed.together():
                before()
                self._probe()
            if self._lost:
                self._reopen()
            # Orbax saves no step before its latest, and counts damaged ones among those to keep.
            for damaged in sorted(self._damaged.intersection(self._manager.all_steps())):
                self._manager.delete(damaged)
            self._damaged.clear()
            save, metadata = ocp.args.StandardSave(state), {CHECKSUMS: sums()}
            # Not `together`: where this fails in one process, Orbax holds the others in a collective.
            if not self._manager.save(step, args=save, custom_metadata=metadata):
                raise FileExistsError(f"there is one of step {self._manager.latest_step()} already")
            self._writing = step

    def _probe(self) -> None:
        """Raises OSError where nothing can be written; Orbax would leave threads that wait for minutes."""
        if distributed.is_main_process():
            probe = self._folder / ".probe"
            probe.write_bytes(b"x" * 4096)
            probe.unlink(missing_ok=True)

    def finish(self, again: Callable[[], None] = lambda: None) -> None:
        """Waits for the last save, and calls `again` to repeat it while it fails.

        Raises:
          UserError: when it failed `final_retries` times more, in minutes.
        """
        self._settle(last=True)
        for attempt in range(self._config.final_retries):
            if not self._failed:
                return
            time.sleep(2**attempt)
            again()
            self._settle(last=True)
        if self._failed:
            raise UserError(
                f"the checkpoint of step {self._failed[-1]} could not be saved; {self._what_is_there()}"
            )

    def _settle(self, last: bool = False) -> None:
        """Waits for what is being written in the background."""
        step, self._writing = self._writing, None
        if step is not None:
            with self._reporting(step, last):
                with distributed.together():
                    self._manager.wait_until_finished()
                self._failed = []
                self._note_whole(step)

    def _note_whole(self, step: int) -> None:
        """Writes the step of a whole checkpoint beside the folder of checkpoints."""
        if distributed.is_main_process():
            with contextlib.suppress(OSError):  # a failure of this file alone is no reason to stop
                self._latest.write_text(f"{step}\n")

    @contextlib.contextmanager
    def _reporting(self, step: int, last: bool) -> Iterator[None]:
        """Reports what goes wrong inside as a failed save of `step`, and gives up after too many."""
        try:
            yield
        except Exception as error:  # whatever a full disk or a lost mount makes the writers raise
            self._failed.append(step)
            count, allowed = len(self._failed), self._config.max_failed_saves
            # One process alone cannot go on: the others may wait for it in the same save.
            alone = jax.process_count() > 1 and not getattr(error, "agreed", False)
            if alone or (count > allowed and not last):
                raise UserError(
                    f"the checkpoint of step {step} could not be saved ({_reason(error)}), the {count}. in a "
                    f"row; {self._what_is_there()}"
                ) from error
            next_ = "trying again" if last else f"{allowed - count} more in a row may fail"
            warn(
                f"the checkpoint of step {step} could not be saved ({_reason(error)}); going on, {next_} "
                f"(config.checkpoint.{'final_retries' if last else 'max_failed_saves'})"
            )
            with contextlib.suppress(Exception):
                self._manager.close()
            self._reopen()

    def _reopen(self) -> None:
        """A new manager, which removes what was half written. Where a mount is gone, and the folder with it,
        there is none until it is back: nothing must land in the place where the mount has been."""
        local = "://" not in str(self._folder)  # a bucket has no folders that could be lost
        self._lost = local and not self._folder.is_dir()
        if not self._lost:
            with contextlib.suppress(OSError):
                self._manager = self._open()

    def _what_is_there(self) -> str:
        newest = self.newest()
        return f"make room or mend {self._folder} and run the same command again: it goes on " + (
            f"from step {newest}, which is whole" if newest else "from the start"
        )

    def restore(self, abstract_state):
        """The newest whole checkpoint, laid out as `abstract_state`, or None when there is none.

        A checkpoint that cannot be read, or whose checksums are not those it was saved with, is named and
        passed over.

        Raises:
          UserError: when there are checkpoints but none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            state, reason = None, "another process could not read it"
            try:
                restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
                _verify(self._manager, step, restored)
                state = restored
            except Exception as error:  # whatever a damaged file makes the readers raise
                reason = _reason(error)
            if distributed.all_agree(state is not None):
                self._note_whole(step)
                return state
            self._damaged.add(step)
            warn(f"checkpoint {self._folder / str(step)} is damaged and passed over: {reason}")
        if steps:
            raise UserError(
                f"none of the checkpoints in {self._folder} can be read; move them away to start anew"
            )
        return None

    def newest(self) -> int:
        """The step of the newest checkpoint that is not known to be damaged, 0 when there is none."""
        return max(set(self._manager.all_steps()) - set(self._failed) - self._damaged, default=0)

    def close(self) -> None:
        """Waits for what is being written."""
        with contextlib.suppress(Exception):  # a failed save was or is being reported
            self._manager.close()


def _verify(manager: ocp.CheckpointManager, step: int, restored) -> None:
    """Raises `UserError` unless restored arrays have the checksums they were saved with."""
    expected = (manager.metadata(step).custom_metadata or {}).get(CHECKSUMS)
    if not isinstance(expected, dict):
        raise UserError("its checksums are missing")
    wrong = checksums.changed(restored, expected)
    if wrong:
        raise UserError(f"{len(wrong)} of its arrays have changed since they were saved ({wrong[0]}, ...)")


def _reason(error: Exception) -> str:
    """What an error of the readers or writers says, without the settings that they append."""
    return (str(error).splitlines() or [type(error).__name__])[0].partition(" [tensorstore_spec")[0]


def _folder(workdir: epath.PathLike) -> epath.Path:
    folder = epath.Path(workdir) / CHECKPOINTS
    return folder if "://" in str(folder) else folder.absolute()


def check_not_lost(workdir: epath.PathLike) -> None:
    """Raises `UserError` when a run had a checkpoint and has none any more.

    Looks at the folder alone: Orbax would wait for the other processes of the job.
    """
    latest, folder = epath.Path(workdir) / LATEST, _folder(workdir)
    if latest.exists() and not (folder.exists() and any(p.name.isdigit() for p in folder.iterdir())):
        raise UserError(
            f"the checkpoints of {workdir} are gone, the last was of step {latest.read_text().strip()}; move "
            f"them back to {folder} to go on, or choose another --workdir to start anew"
        )


def find_step(workdir: epath.PathLike, step: int | None = None) -> int:
    """The step of a run's newest checkpoint; or `step`, where there is one of it.

    Raises:
      UserError: when there is no such checkpoint.
    """
    folder = _folder(workdir)
    try:
        missing = not folder.is_dir()
    except OSError as error:
        raise UserError(f"no run at {workdir}: {error.strerror or error}") from error
    if missing:
        raise UserError(f"no run at {workdir}: {folder} is missing")
    with _reader(folder) as manager:
        steps = manager.all_steps()
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}")
    return max(steps) if step is None else step


def _reader(folder: epath.Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(read_only=True, lightweight_initialize=True)
    return ocp.CheckpointManager(folder, options=options)


def restore_params(
    workdir: epath.PathLike, abstract_params: dict, step: int | None = None
) -> tuple[int, dict]:
    """Only the parameters of a run's newest checkpoint (or that of `step`), and its step."""
    step, parts = restore_parts(workdir, {"params": abstract_params}, step)
    return step, parts["params"]


def restore_parts(workdir: epath.PathLike, abstract_parts: dict, step: int | None = None) -> tuple[int, dict]:
    """Some fields of the training state in a run's newest checkpoint (or that of `step`), and its step.

    Args:
      workdir: of the run.
      abstract_parts: field name -> what to restore into.
      step: of the checkpoint.

    Raises:
      UserError: when there is no such checkpoint, or it is of another model or optimizer.
    """
    step, folder = find_step(workdir, step), _folder(workdir)
    with _reader(folder) as manager:
        restore = ocp.args.PyTreeRestore(
            abstract_parts,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_parts),
            partial_restore=True,
        )
        try:
            parts = manager.restore(step, args=restore)
            _verify(manager, step, parts)
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise UserError(
                f"checkpoint {folder / str(step)} is damaged or of another model or optimizer: "
                f"{_reason(error)}"
            ) from error
        return step, parts


def abstract(tree, shardings):
    """Shapes, types and layouts of a tree, to restore into."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
