"""Restores parts of a run's checkpoints, for forks, evaluation and export."""

from __future__ import annotations

import orbax.checkpoint as ocp
from etils import epath

from dualsm.process.errors import UserError
from dualsm.process.paths import retry
from dualsm.rundir.checkpoint import error_reason
from dualsm.rundir.checkpoint_folder import checkpoints_folder
from dualsm.rundir.checkpoint_metadata import saved_part, verify


def find_step(workdir: epath.PathLike, step: int | None = None) -> int:
    """Returns the step of a run's newest checkpoint, or `step` if the run has a checkpoint of that step.

    Raises:
      UserError: if the run does not have this checkpoint.
    """
    steps, folder = checkpoint_steps(workdir), checkpoints_folder(workdir)
    if not steps:
        raise UserError(f"{folder} has no checkpoint; train the run until its first save")
    if step is not None and step not in steps:
        listed = ", ".join(map(str, steps))
        raise UserError(f"{folder} has no checkpoint of step {step}; choose one of {listed}")
    return steps[-1] if step is None else step


def checkpoint_steps(workdir: epath.PathLike) -> list[int]:
    """Returns the steps of a run's checkpoints, ascending.

    Raises:
      UserError: if the run does not exist.
    """
    folder = checkpoints_folder(workdir)
    try:
        missing = not folder.is_dir()
    except OSError as error:
        raise UserError(f"no run at {workdir}: {error.strerror or error}") from error
    if missing:
        raise UserError(f"no run at {workdir}: {folder} is missing; check the path")
    with _reader(folder) as manager:
        return sorted(manager.all_steps())


def _reader(folder: epath.Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(read_only=True, lightweight_initialize=True)
    return ocp.CheckpointManager(folder, options=options)


def restore_params(
    workdir: epath.PathLike, abstract_params: dict, step: int | None = None
) -> tuple[int, dict]:
    """Restores the parameters from a run's checkpoint; see `restore_parts`."""
    step, parts = restore_parts(workdir, {"params": abstract_params}, step)
    return step, parts["params"]


def restore_parts(workdir: epath.PathLike, abstract_parts: dict, step: int | None = None) -> tuple[int, dict]:
    """Restores some fields of the train state from a run's checkpoint.

    Args:
      workdir: the run directory.
      abstract_parts: field name -> tree of shapes, dtypes and shardings. Fields that the checkpoint lacks
        are not restored.
      step: step of the checkpoint; None: the newest.

    Returns:
      The step of the checkpoint, and field name -> tree of arrays.

    Raises:
      UserError: if the checkpoint does not exist, is damaged, or is of another model or optimizer.
    """
    step, folder = find_step(workdir, step), checkpoints_folder(workdir)
    with _reader(folder) as manager:
        try:
            wanted = saved_part(manager, step, abstract_parts)
            if not wanted:
                return step, {}
            restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
            restore = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
            parts = retry(lambda: manager.restore(step, args=restore), folder, attempts=3)
            verify(manager, step, parts)
        except Exception as error:  # damaged files raise various errors
            raise UserError(
                f"checkpoint {folder / str(step)} is damaged or of another model or optimizer: "
                f"{error_reason(error)}"
            ) from error
        return step, parts
