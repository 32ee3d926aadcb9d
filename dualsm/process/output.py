"""Files and folders that commands write to: refused before the work, and there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from dualsm.process.errors import UserError

_LOCK = ".lock"


def make_folder(folder: Path, flag: str) -> None:
    """Makes a folder for results. Raises `UserError`, naming the flag it comes from, when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: cannot make the folder {folder}: {error.strerror}") from error


def check_output(path: Path, flag: str) -> None:
    """Makes the folder of a file, before the work whose results it is for.

    Args:
      path: of the file.
      flag: that it comes from.

    Raises:
      UserError: when no file can be written there.
    """
    make_folder(path.parent, flag)
    if path.is_dir():
        raise UserError(f"{flag}={path} is a folder; name a file in it")


def write_output(path: Path, text: str, flag: str) -> None:
    """Writes aside and renames, so that nobody reads half a file.

    Raises:
      UserError: when it cannot be written; nothing is left aside.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise UserError(f"{flag}: cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def new_folder(target: Path, flag: str) -> Iterator[Path]:
    """A folder beside `target` to write in, which is renamed to it when the block ends well.

    Such folders that dead processes left are removed. Whether a process lives tells its lock on a file in its
    folder, which is the operating system's: it goes when the process goes, however that ends, and holds for
    other machines and containers on the same disk. Where a file system knows no locks nothing is removed.

    Args:
      target: the folder to make; an empty one may be there.
      flag: that it comes from.

    Raises:
      UserError: when `target` is there with something in it, also by the end, or cannot be made.
      OSError: of the block, or when the disk fails at its end.
    """
    target = target.absolute()
    prefix = f".{target.name}.partial-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for lock in target.parent.glob(f"{glob.escape(prefix)}*/{_LOCK}"):
            _remove_if_left(lock)
        _refuse_full(target, flag)
        aside = target.parent / f"{prefix}{secrets.token_hex(4)}"
        aside.mkdir()
    except OSError as error:
        raise UserError(f"{flag}={target} cannot be made: {error.strerror or error}") from error
    try:
        # Under its name only once it is locked: unlocked, it would be taken for a dead process's.
        with open(aside / f"{_LOCK}.new", "w") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (aside / f"{_LOCK}.new").rename(aside / _LOCK)
            yield aside
            (aside / _LOCK).unlink()
            _refuse_full(target, flag)
            aside.rename(target)  # over an empty folder
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _refuse_full(target: Path, flag: str) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{flag}={target} is there already; remove it or choose another")


def _remove_if_left(lock: Path) -> None:
    """Removes the folder of a lock that nobody holds."""
    with contextlib.suppress(OSError), open(lock, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.parent, ignore_errors=True)
