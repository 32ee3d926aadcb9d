"""Output files and folders: checked before the work starts, and written atomically."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from etils import epath

from dualsm.process.errors import BucketError, UserError
from dualsm.process.paths import files_in, is_remote, real_path, retry, upload, user_path, write_object

_LOCK = ".lock"
_INCOMPLETE = ".incomplete"  # object in a folder of a bucket that is being uploaded


def make_folder(folder: epath.Path, flag: str) -> None:
    """Creates a folder and its parents. Raises `UserError`, naming the flag, if that fails."""
    if is_remote(folder):  # buckets have no folders
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{flag}: cannot create the folder {folder} ({error.strerror}); choose another"
        ) from error


def check_output(path: epath.Path, flag: str) -> None:
    """Creates the folder of an output file.

    Args:
      path: output file.
      flag: flag that sets the path, for messages.

    Raises:
      UserError: if the folder cannot be created, or `path` is a folder.
    """
    make_folder(path.parent, flag)
    if path.is_dir():
        raise UserError(f"{flag}={path} is a folder; name a file in it")


def partial_path(path: epath.PathLike) -> epath.Path:
    """Returns the path of a file while `write_atomically` writes it."""
    path = epath.Path(path)
    return path.with_name(f".{path.name}.partial")


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file, local or in a bucket, so that readers see either all of it or the previous version.

    Raises:
      OSError: if the file cannot be written; the previous version is unchanged.
    """
    content = content if isinstance(content, bytes) else content.encode()
    if is_remote(path):
        write_object(user_path(path), content)
        return
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_output(path: epath.Path, text: str, flag: str) -> None:
    """Writes a text file atomically. Raises `UserError`, naming the flag, if that fails."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{flag}: cannot write {path} ({error.strerror}); choose another file") from error


@contextlib.contextmanager
def new_folder(target: epath.Path, flag: str, last: str) -> Iterator[Path]:
    """Yields a temporary local folder, which becomes `target` if the block succeeds.

    A local `target` is complete or does not exist: the temporary folder is renamed. In a bucket, where a
    rename is not atomic, the files are uploaded one by one and the file `last`, without which no command
    reads the folder, is written after all others. If the rename or the upload fails, the temporary folder is
    kept and the error names it. An interrupted upload leaves an object `.incomplete`, and the next call with
    the same target deletes the leftovers. Callers that check the target earlier call
    `remove_interrupted_upload` first. Concurrent calls with the same target in a bucket are not detected.

    If `target` is a symbolic link, the folder that the link names is created.

    Locally, also removes temporary folders of processes that died. Each process locks a file in its folder:
    a held lock means that the process is alive, also on other machines and in containers that share the
    disk. On file systems without locks no folder is removed.

    Args:
      target: folder to create; may exist if it is empty and not a mount point.
      flag: flag that sets the folder, for messages.
      last: name of the file that makes a folder in a bucket complete.

    Raises:
      UserError: if `target` is not empty, at the start or at the end, is a mount point, or cannot be created.
      OSError: if the block or the upload raises it.
    """
    if is_remote(target):
        with _uploaded_folder(target, flag, last) as folder:
            yield folder
        return
    target = Path(target).absolute()
    try:
        with contextlib.suppress(FileNotFoundError):
            target.stat()  # raises for symbolic links that point at each other, which `real_path` ignores
        folder = Path(real_path(target))  # a folder cannot be renamed to a symbolic link
        prefix = f".{folder.name}.partial-"
        folder.parent.mkdir(parents=True, exist_ok=True)
        for lock in folder.parent.glob(f"{glob.escape(prefix)}*/{_LOCK}"):
            _remove_if_abandoned(lock)
        check_empty(target, flag)
        partial = folder.parent / f"{prefix}{secrets.token_hex(4)}"
        partial.mkdir()
    except OSError as error:
        raise UserError(
            f"{flag}={target} cannot be created ({error.strerror or error}); choose another"
        ) from error
    is_kept = False
    try:
        # The file gets its name only once it is locked, or another process would remove the folder.
        with open(partial / f"{_LOCK}.new", "w") as file:
            try_lock(file)
            (partial / f"{_LOCK}.new").rename(partial / _LOCK)
            yield partial
            _check_unused(target, flag)
            try:
                (partial / _LOCK).unlink()  # also keeps later calls from removing a folder that is kept
                partial.rename(folder)  # over an empty folder
            except OSError as error:
                is_kept = True
                reason = f"{error.strerror or error}; the complete folder is {partial}, rename it"
                raise UserError(f"{flag}={target} cannot be created: {reason}") from error
    finally:
        if not is_kept:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _uploaded_folder(target: epath.Path, flag: str, last: str) -> Iterator[Path]:
    """Yields a temporary folder, which is uploaded if the block succeeds and kept if the upload fails."""
    remove_interrupted_upload(target, last)
    check_empty(target, flag)
    write_object(target / _INCOMPLETE, b"")  # the bucket must be writable before the work starts
    _remove_object(target / _INCOMPLETE)
    folder, is_kept = Path(tempfile.mkdtemp(prefix="dualsm-")), False
    try:
        yield folder
        check_empty(target, flag)
        try:
            write_object(target / _INCOMPLETE, b"")
            upload(folder, target, last)
        except OSError as error:
            is_kept = True
            reason = f"{error.strerror or error}; the complete folder is in {folder}, copy it to the bucket"
            raise BucketError(errno.EIO, reason, str(target)) from error
        _remove_object(target / _INCOMPLETE)
    finally:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_object(path: epath.Path) -> None:
    retry(lambda: path.unlink(missing_ok=True), path)


def remove_interrupted_upload(target: epath.Path, last: str) -> None:
    """Deletes the leftovers of an interrupted upload to a folder in a bucket; keeps a complete folder.

    Does nothing for a local folder.

    Args:
      target: the folder.
      last: as in `new_folder`.
    """
    if not is_remote(target) or not (target / _INCOMPLETE).exists():
        return
    if (target / last).exists():  # only the removal of the object was interrupted
        (target / _INCOMPLETE).unlink(missing_ok=True)
        return
    for path in sorted(files_in(target), key=lambda path: path == target / _INCOMPLETE):  # that object last
        path.unlink(missing_ok=True)


def try_lock(file: IO) -> bool | None:
    """Locks an open file until it is closed or the process ends, without waiting.

    The package filelock is not used because it empties a lock file before it has the lock, and with it the
    name of the process that holds the lock.

    Returns:
      True if the lock was taken, False if another process holds it, None on a file system without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def check_empty(target: epath.PathLike, flag: str) -> None:
    """Raises `UserError`, naming the flag, unless `new_folder` can create or replace the folder.

    The folder must be empty or not exist. It must not be a mount point, which cannot be replaced.
    """
    target = user_path(target)
    if not is_remote(target) and os.path.ismount(real_path(target)):
        raise UserError(f"{flag}={target} is a mount point; name a folder in it")
    _check_unused(target, flag)


def _check_unused(target: epath.PathLike, flag: str) -> None:
    target = user_path(target)
    if target.exists() and not is_empty_folder(target):
        raise UserError(f"{flag}={target} already exists; remove it or choose another")


def is_empty_folder(path: epath.Path) -> bool:
    """Returns True for an existing folder without files and subfolders."""
    if not path.is_dir():
        return False
    if is_remote(path):
        return not any(path.iterdir())
    return not os.listdir(path)  # `epath.Path.iterdir` omits files such as "notes~"


def _remove_if_abandoned(lock: Path) -> None:
    """Removes the folder of a lock file if no process holds the lock."""
    with contextlib.suppress(OSError), open(lock, "r+") as file:
        if try_lock(file) is True:
            shutil.rmtree(lock.parent, ignore_errors=True)
