"""Failures that the user can mend, and the one line that tells of each."""

from __future__ import annotations

import errno
import select
import sys

# Errors of the operating system that any command may meet and a user can mend.
_DISK = "check free space, permissions and the disk, or choose another folder"
_NETWORK = "check the network and run the same command again"
_ADVICE = dict.fromkeys((
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE,
    errno.ENOTCONN, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ENODEV,
), _DISK) | dict.fromkeys((
    errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH,
), _NETWORK) | {
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the symbolic links that point at each other",
    errno.EMFILE: "allow more open files per process with `ulimit -n`",
    errno.ENFILE: "this machine has too many open files; end other programs",
    errno.ENOMEM: "out of memory; end other programs or use a machine with more",
}  # fmt: skip

UNREAD = 141  # exit status of a command whose output is read no more, as if by SIGPIPE


class UserError(Exception):
    """A mistake the user can mend: its text says what is wrong, where, and what to do."""


def explained(error: BaseException) -> str | None:
    """What is wrong and what to do, of an error that has its cause outside of the code; None of any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _ADVICE:
        return f"{error}; {_ADVICE[error.errno]}"
    if isinstance(error, RuntimeError):  # as JAX's are
        text = str(error)
        if "Unable to initialize backend" in text:
            return f"{text}; install the extra for it (cuda, tpu), or unset JAX_PLATFORMS"
        if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
            reason = text.strip().partition("\n")[0]  # accounts of who holds how much follow
            return (
                f"the devices' memory does not suffice ({reason}); in training lower "
                "config.per_device_batch_size (or config.batch_size), set config.model.remat=full, or "
                "divide the parameters with a larger config.mesh.fsdp"
            )
    return None


def unread(error: BaseException) -> bool:
    """Whether an error comes of a reader of stdout that is gone, such as a `head` that has seen enough."""
    if not isinstance(error, BrokenPipeError):
        return False
    pipe = select.poll()
    pipe.register(sys.stdout, 0)
    return bool(pipe.poll(0))  # which tells of nothing but its end
