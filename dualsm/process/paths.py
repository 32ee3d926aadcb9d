"""Paths that users write: local, or in a bucket of Google Cloud Storage (`gs://BUCKET/...`).

Every path of a flag or a config passes through `user_path` before anything else uses it: `pathlib` would turn
`gs://` into `gs:/`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import heapq
import importlib.util
import io
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import BinaryIO, TypeVar

from etils import epath

from dualsm.process.errors import BucketError, UserError

_SCHEME = re.compile("[a-z0-9]+://")
_LIKE_URI = re.compile("/(gs|s3|az|hf)(/|$)")
_UNREADABLE = ("lost+found",)  # folders of file systems, readable by root only
_T = TypeVar("_T")
_ATTEMPTS = 6  # per operation on a bucket, with pauses of about 1, 2, 4, ... seconds
_THREADS = 16  # hide the latency of a bucket


def user_path(path: epath.PathLike) -> epath.Path:
    """Returns the path that a user wrote, with `~` expanded.

    Raises:
      UserError: if the path is in a bucket and gcsfs is not installed, or in another object store.
    """
    if is_remote(path):
        if not str(path).startswith("gs://"):
            raise UserError(
                f"{path}: only Google Cloud Storage is supported; use gs://BUCKET/PATH (other URLs can only "
                "be inputs of prepare, and hf:// also weights of convert import)"
            )
        if importlib.util.find_spec("gcsfs") is None:
            raise UserError(f"{path}: gcsfs is not installed; run pip install 'dualsm[gcs]'")
        _set_up_gcsfs()
    path = os.path.expanduser(path)
    # etils reads /gs/... as gs://..., but not //gs/..., which is the same file.
    return epath.Path(f"/{path}" if _LIKE_URI.match(path) else path)


def is_remote(path: epath.PathLike) -> bool:
    """Returns True for a path in a bucket."""
    return _SCHEME.match(str(path)) is not None


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns an absolute path; paths in buckets are absolute."""
    path = user_path(path)
    return path if is_remote(path) else user_path(os.path.join(os.getcwd(), path))


def real_path(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path of a local file or folder, without symbolic links."""
    return user_path(os.path.realpath(path))


@functools.cache
def _set_up_gcsfs() -> None:
    import fsspec.config

    for protocol in ("gs", "gcs"):  # other processes write to the same folders
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def size_and_time(path: epath.PathLike) -> tuple[int, ...]:
    """Returns the size in bytes of a file, and numbers that change when it is written.

    Raises:
      OSError: if the file does not exist.
    """
    if is_remote(path):
        stat = user_path(path).stat()
        return stat.length, stat.mtime
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def files_in(folder: epath.PathLike) -> list[epath.Path]:
    """Returns the files in a folder and its subfolders, sorted.

    Local subfolders may be symbolic links. Files in a folder that several links lead to are returned once.
    Links in hidden folders are not followed, and hidden folders that cannot be read are skipped.

    Raises:
      UserError: if a local folder cannot be read.
    """
    folder = user_path(folder)
    if is_remote(folder):
        found = [f"gs://{name}" for name in _bucket_file_system().find(str(folder))]
    else:
        found = _local_files_in(str(folder))
    return sorted(map(epath.Path, found))


def is_hidden(name: str) -> bool:
    """Returns True for the name of a hidden file or folder, or of a backup."""
    return name.startswith((".", "~"))


def _local_files_in(folder: str) -> list[str]:
    """Returns the files in a local folder and its subfolders; see `files_in`.

    Of the paths of a folder, those without links are preferred, so that links do not change other paths.
    Paths with hidden folders come last, because callers ignore the files in them.
    """
    found, visited = [], set()
    waiting = [(False, False, folder)]  # hidden, linked, path; the smallest is visited first
    while waiting:
        hidden, linked, path = heapq.heappop(waiting)
        if (real := os.path.realpath(path)) in visited:
            continue
        visited.add(real)
        try:
            files, folders = _list_folder(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if hidden or os.path.basename(path) in _UNREADABLE:
                continue
            raise UserError(
                f"cannot read the folder {error.filename} ({error.strerror}); check its permissions"
            ) from error
        found += files
        for entry in folders:
            if not (hidden and entry.is_symlink()):
                order = hidden or is_hidden(entry.name), linked or entry.is_symlink()
                heapq.heappush(waiting, (*order, entry.path))
    return found


def _list_folder(path: str) -> tuple[list[str], list[os.DirEntry]]:
    """Returns the files and the subfolders of a local folder, without links that lead nowhere."""
    files, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                if entry.is_file():
                    files.append(entry.path)
                elif entry.is_dir():
                    folders.append(entry)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
    return files, folders


def sizes_in(folder: epath.PathLike) -> dict[str, int]:
    """Returns the size in bytes of each file in a folder by its name, without subfolders.

    Lists the folder once: a request per file of a bucket would take long for thousands of files.
    """
    folder = user_path(folder)
    if is_remote(folder):
        entries = retry(lambda: _bucket_file_system().ls(str(folder), detail=True), folder)
        return {
            entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"
        }
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def glob_in_bucket(pattern: str) -> tuple[list[str], list[str]]:
    """Returns the objects and folders in a bucket that match `gs://...`.

    `**` matches any number of folders.
    """
    user_path(pattern)
    found = _bucket_file_system().glob(pattern, detail=True)
    files, folders = (
        sorted(f"gs://{name.rstrip('/')}" for name, info in found.items() if info["type"] == kind)
        for kind in ("file", "directory")
    )
    return files, folders


def _bucket_file_system():
    import fsspec

    return fsspec.filesystem("gcs")


def open_binary(path: epath.PathLike, buffering: int = -1) -> BinaryIO:
    """Opens a file for reading, with `readline(limit)` and `tell`."""
    if is_remote(path):
        return io.BufferedReader(user_path(path).open("rb"), max(buffering, io.DEFAULT_BUFFER_SIZE))
    return open(path, "rb", buffering)


def read_ranges(path: epath.PathLike, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the bytes in ranges [start, stop) of a file; in a bucket, with concurrent requests."""
    if is_remote(path):
        starts, stops = map(list, zip(*ranges, strict=True))
        file_system = _bucket_file_system()
        return file_system.cat_ranges([str(path)] * len(ranges), starts, stops, on_error="raise")
    with open(path, "rb", buffering=0) as file:
        return [os.pread(file.fileno(), stop - start, start) for start, stop in ranges]


def write_object(path: epath.Path, content: bytes, attempts: int = _ATTEMPTS) -> None:
    """Writes an object in a bucket, with retries; readers see the previous object or the new one.

    Raises:
      BucketError: if all attempts fail.
    """
    _retry(lambda: path.write_bytes(content), path, attempts)


def upload(folder: epath.PathLike, target: epath.Path, last: str = "") -> None:
    """Copies a local folder into a bucket, with retries; the file `last` is written after all others.

    Raises:
      BucketError: if all attempts for a file fail.
    """
    paths = [os.path.join(at, name) for at, _, found in os.walk(folder) for name in found]
    names = sorted(os.path.relpath(path, folder) for path in paths)

    def copy(name: str) -> None:
        with open(os.path.join(folder, name), "rb") as source, (target / name).open("wb") as copied:
            shutil.copyfileobj(source, copied, 1 << 22)

    def copy_with_retries(name: str) -> None:
        _retry(lambda: copy(name), target / name)

    with futures.ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(copy_with_retries, [name for name in names if name != last]):
            pass
    if last in names:
        copy_with_retries(last)


@contextlib.contextmanager
def local_copy(path: epath.PathLike, *siblings: str) -> Iterator[str]:
    """Yields the path of a local copy of a file or folder in a bucket; local paths are yielded unchanged.

    Args:
      path: a file or folder.
      siblings: names of files in the same folder that are also copied.
    """
    if not is_remote(path):
        yield str(path)
        return
    source = user_path(path)
    with tempfile.TemporaryDirectory(prefix="dualsm-") as folder:
        for one in (source, *(source.with_name(name) for name in siblings)):
            files = files_in(one) if one.is_dir() else [one]
            for file in files:
                target = epath.Path(folder) / file.relative_to(source.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open("rb") as remote, target.open("wb") as copied:
                    shutil.copyfileobj(remote, copied, 1 << 22)
        yield os.path.join(folder, source.name)


def retry(work: Callable[[], _T], path: epath.PathLike, attempts: int = _ATTEMPTS) -> _T:
    """Returns the result of `work`, which is retried after an error if `path` is in a bucket."""
    return _retry(work, path, attempts) if is_remote(path) else work()


def _retry(work: Callable[[], _T], path: epath.PathLike, attempts: int = _ATTEMPTS) -> _T:
    """Retries `work` until it succeeds. Raises `BucketError` after the last attempt."""
    for attempt in range(attempts):
        try:
            return work()
        except Exception as error:  # the network libraries raise various errors
            # Processes of a job agree on an error inside `together`, where it is a UserError in some of them.
            agreed = getattr(error, "agreed", False)
            if isinstance(error, UserError) and not agreed:
                raise
            if attempt == attempts - 1:
                reason = " ".join(str(error).split()) or type(error).__name__
                failure = BucketError(errno.EIO, reason, str(path))
                failure.agreed = agreed
                raise failure from error
            time.sleep(2**attempt * random.uniform(0.5, 1))
    raise ValueError(f"attempts={attempts} must be at least 1")
