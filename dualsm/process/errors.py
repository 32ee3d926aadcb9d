"""Errors that a user can fix, and their one-line messages."""

from __future__ import annotations

import errno
import select
import sys
import traceback

# Operating system errors that a user can fix.
_DISK = "check free space, permissions and the disk, or choose another folder"
WHERE_KEYS_ARE_LISTED = (
    "see dualsm/config_keys.py for the keys, docs/objectives.md for those of mixture, objectives and pairs, "
    "docs/data.md for those of sources; sources, and pairs other than mir and nemotron, exist only if the "
    "config file adds them"
)
_BUCKET = (
    "check the name of the bucket or URL, your access to it and the network, and run the same command again"
)
_BUCKET_LIBRARIES = ("gcsfs", "aiohttp", "google")  # whose exceptions have various base classes
_FILE_SYSTEMS = ("gcsfs", "fsspec")
_NETWORK = "check the network and run the same command again"
_ADVICE = dict.fromkeys((
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE,
    errno.ENOTCONN, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ENODEV,
), _DISK) | dict.fromkeys((
    errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH,
), _NETWORK) | {
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EBUSY: "the path is a mount point or in use; choose another",
    errno.ELOOP: "remove the symbolic links that point at each other",
    errno.EMFILE: "allow more open files per process with `ulimit -n`",
    errno.ENFILE: "this machine has too many open files; end other programs",
    errno.ENOMEM: "out of memory; end other programs or use a machine with more",
}  # fmt: skip

BROKEN_PIPE = 141  # exit status after a broken pipe on stdout, as if killed by SIGPIPE


class UserError(Exception):
    """An error that the user can fix; the message says what is wrong, where, and what to do."""


class BucketError(OSError):
    """A failure of a bucket or of its network connection, after retries; the command may succeed later."""


def user_message(error: BaseException) -> str | None:
    """Returns a message for an error that the user can fix, or None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if _is_bucket_failure(error):
        return f"{' '.join(str(error).split()) or type(error).__name__}; {_BUCKET}"
    if isinstance(error, OSError) and error.errno in _ADVICE:
        return f"{error}; {_ADVICE[error.errno]}"
    if isinstance(error, FileNotFoundError) and _origin(error) in _FILE_SYSTEMS:  # it has no errno
        return f"{error} does not exist; check the path"
    if isinstance(error, RuntimeError):  # the base class of JAX's errors
        text = str(error)
        if "Unable to initialize backend" in text:
            return f"{text}; install the extra for it (cuda, tpu), or unset JAX_PLATFORMS"
        if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
            reason = text.strip().partition("\n")[0]  # the following lines list allocations
            return (
                f"out of device memory ({reason}); to train, set or lower "
                "config.per_device_batch_size, lower config.batch_size, set config.model.remat=full, or "
                "shard the parameters with a larger config.mesh.fsdp"
            )
    return None


def exit_status(error: BaseException) -> int:
    """Returns the exit status for an error with a `user_message`: 1 if a retry may succeed, otherwise 2.

    Launchers retry a command that ended with status 1.
    """
    return 1 if _is_bucket_failure(error) else 2


def _is_bucket_failure(error: BaseException) -> bool:
    return isinstance(error, BucketError) or type(error).__module__.partition(".")[0] in _BUCKET_LIBRARIES


def _origin(error: BaseException) -> str:
    """Returns the package that raised an error, or "" if it was not raised."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return modules[-1].partition(".")[0] if modules else ""


def is_broken_stdout(error: BaseException) -> bool:
    """Returns True if an error is a broken pipe on stdout, for example because `head` has exited."""
    if not isinstance(error, BrokenPipeError):
        return False
    pipe = select.poll()
    pipe.register(sys.stdout, 0)
    return bool(pipe.poll(0))  # without requested events, poll reports only errors and hang-ups
