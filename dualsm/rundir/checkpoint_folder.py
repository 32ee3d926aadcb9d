"""The folder of a run's checkpoints, and the file that reveals lost checkpoints."""

from __future__ import annotations

from etils import epath

from dualsm.process.errors import UserError
from dualsm.process.paths import absolute, is_remote, user_path

CHECKPOINTS = "checkpoints"
LATEST = "latest_checkpoint"  # file with the step of the newest intact checkpoint; reveals lost checkpoints
_COMMITTED = "commit_success.txt"  # object that Orbax writes last, in buckets


def checkpoints_folder(workdir: epath.PathLike) -> epath.Path:
    """Returns the folder of a run's checkpoints."""
    return absolute(workdir) / CHECKPOINTS


def has_checkpoint(workdir: epath.PathLike, step: int) -> bool:
    """Returns True if a run has a complete checkpoint of a step.

    Does not use Orbax, which initializes JAX's backend: a process that starts others must leave it to them.
    """
    folder = checkpoints_folder(workdir) / str(step)
    if is_remote(folder):
        return (folder / _COMMITTED).exists()
    return folder.is_dir()


def is_trained(workdir: epath.PathLike) -> bool:
    """Returns True if a run has a checkpoint after step 0, complete or not. Does not use Orbax."""
    return any(step > 0 for step in _steps(workdir))


def _steps(workdir: epath.PathLike) -> list[int]:
    folder = checkpoints_folder(workdir)
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []


def check_not_lost(workdir: epath.PathLike) -> None:
    """Raises `UserError` if a run has no checkpoints although one has been saved.

    Lists the folder without Orbax, which would wait for the other processes of the job.
    """
    latest = user_path(workdir) / LATEST
    if latest.exists() and not _steps(workdir):
        raise UserError(
            f"the checkpoints of {workdir} are missing, the last was of step {latest.read_text().strip()}; "
            f"move them back to {checkpoints_folder(workdir)} to resume, or choose another --workdir"
        )
