"""Input files at URLs: any protocol of fsspec, such as hf://, s3:// and https://, for reading only.

Local paths and buckets of Google Cloud Storage (`gs://`) are left to `paths`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from etils import epath

from dualsm.process.errors import BucketError, UserError
from dualsm.process.paths import is_remote, local_copy, open_binary, retry, size_and_time, user_path

_EXTRAS = {"hf": "hub", "http": "http", "https": "http", "s3": "s3", "s3a": "s3"}
_ATTEMPTS = 3  # per read; most file systems also retry requests
_MIN_BUFFER = 1 << 16
_MAX_READ = 1 << 20  # bytes; what was read before a connection is lost is kept
_TIMEOUT = 60  # seconds without data from an HTTP server


def is_url(path: epath.PathLike) -> bool:
    """Returns True for a remote path outside of Google Cloud Storage."""
    return is_remote(path) and not str(path).startswith("gs://")


def is_existing_path(pattern: str) -> bool:
    """Returns True if a list of paths or globs is the name of one existing path, local or `gs://`."""
    is_list = re.search(",[a-z0-9]+://", pattern) is not None
    return bool(pattern) and not is_list and not is_url(pattern) and user_path(pattern).exists()


def file_name(path: str) -> str:
    """Returns the last part of a path or URL, without the query of an HTTP URL."""
    return posixpath.basename(_split_query(path)[0])


def without_queries(pattern: str) -> str:
    """Returns comma-separated paths and URLs without the queries of HTTP URLs."""
    return ",".join(_split_query(part)[0] for part in pattern.split(","))


def _split_query(path: str) -> tuple[str, str]:
    """Returns a path or URL without the query of an HTTP URL, and the query with its separator."""
    base = re.split("[?#]", path)[0] if _is_http(path) else path
    return base, path[len(base) :]


def find_files(url: str) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the files at a URL, which may be a file, a folder or a glob, in a fixed order.

    Returns:
      The URLs of the files, and all files in each folder that the URL names or matches, by its URL. Folders
      that a glob with `**` matches are left out, because it also matches their files, and so are those of
      HTTP servers, whose lists can lead anywhere.

    Raises:
      UserError: if the protocol is unknown or its package is not installed.
      BucketError: if the server does not answer.
    """
    with _one_line(url):
        system, path = _resolve(url)
        if is_glob(url) and (found := system.glob(path, detail=True)):
            names, folders = (
                sorted(name for name, info in found.items() if info["type"] == kind)
                for kind in ("file", "directory")
            )
            if "**" in url or _is_http(url):
                folders = []
            return list(map(system.unstrip_protocol, names)), _files_in(system, folders)
        try:
            kind = system.info(path)["type"]
        except FileNotFoundError as error:
            if _is_unreachable(error):
                raise
            return [], {}
        return ([url], {}) if kind == "file" else ([], _files_in(system, [path]))


def _files_in(system: Any, folders: Sequence[str]) -> dict[str, list[str]]:
    """Returns the URLs of all files in each folder, by the URL of the folder."""
    return {
        system.unstrip_protocol(folder).rstrip("/"): sorted(map(system.unstrip_protocol, system.find(folder)))
        for folder in folders
    }


def is_glob(url: str) -> bool:
    """Returns True if a URL has a wildcard."""
    return re.search("[*[]" if _is_http(url) else "[*?[]", url) is not None


def _is_http(url: str) -> bool:
    return re.match("https?://", url) is not None  # a `?` begins the query


def input_size(path: str) -> tuple[int, ...]:
    """Returns the size of a file in bytes, 0 if it is unknown, and numbers that change when it is written."""
    if not is_url(path):
        return size_and_time(path)
    with _one_line(path):
        system, name = _resolve(path)
        return (system.info(name).get("size") or 0,)


def open_input(path: str, buffering: int = -1) -> BinaryIO:
    """Opens a file for reading, with `readline(limit)` and `tell`, and `seek` if it is `seekable()`."""
    if not is_url(path):
        return open_binary(path, buffering)
    return io.BufferedReader(_UrlFile(path), max(buffering, _MIN_BUFFER))


@contextlib.contextmanager
def random_access(path: str) -> Iterator[str | BinaryIO]:
    """Yields a file whose parts can be read in any order: the path of a local file, or an open remote file.

    A file of unknown size, or on a server that only sends whole files, is copied to a temporary folder.
    """
    if not is_remote(path):
        yield path
        return
    with open_input(path) as file:
        if file.seekable():
            yield file
            return
    with local_input(path) as copy:
        yield copy


@contextlib.contextmanager
def local_input(path: str, *siblings: str) -> Iterator[str]:
    """Yields a local path of a file: the file itself, or a temporary copy of a remote file.

    Args:
      path: the file.
      siblings: names of files in the same folder that are also copied.
    """
    if not is_url(path):
        with local_copy(path, *siblings) as copy:
            yield copy
        return
    base, query = _split_query(path)
    with tempfile.TemporaryDirectory(prefix="dualsm-") as folder:
        for url in (path, *(f"{posixpath.dirname(base)}/{name}{query}" for name in siblings)):
            with open_input(url) as source, open(os.path.join(folder, file_name(url)), "wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)
        yield os.path.join(folder, file_name(path))


class _UrlFile(io.RawIOBase):
    """Reads a file at a URL, and continues where it was after an error."""

    def __init__(self, url: str):
        self._url, self._position, self._file = url, 0, None
        self._streamed = False  # from a server that only sends whole files
        self._sends_parts: bool | None = None  # None: unknown

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        """Returns True if the server sends parts of the file."""
        if self._sends_parts is None:  # `io.BufferedReader` asks before each seek
            self._sends_parts = retry(self._sends_last_byte, self._url, _ATTEMPTS)
        return self._sends_parts

    def _sends_last_byte(self) -> bool:
        if not self._size:
            return False
        system, path = _resolve(self._url)
        try:
            with system.open(path, "rb") as file:
                file.seek(self._size - 1)
                return len(file.read(1)) == 1
        except ValueError:  # also `io.UnsupportedOperation`
            return False

    @functools.cached_property
    def _size(self) -> int:
        return retry(lambda: input_size(self._url)[0], self._url, _ATTEMPTS)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: lambda: 0, os.SEEK_CUR: self.tell, os.SEEK_END: lambda: self._size}[whence]()
        self._position = start + offset
        if self._file is not None:
            self._file.seek(self._position)
        return self._position

    def readinto(self, buffer) -> int:
        size = min(len(buffer), _MAX_READ)
        data = retry(lambda: self._read(size), self._url, _ATTEMPTS)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            try:
                return self._read_on(size)
            except ValueError:  # the HTTP server does not support range requests
                if self._sends_parts or self._streamed or not _is_http(self._url):
                    raise
                self._close_file()
                self._streamed = True
                return self._read_on(size)
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not _is_unreachable(error):
                raise UserError(f"{self._url} does not exist; check the URL") from error
            self._close_file()
            raise

    def _read_on(self, size: int) -> bytes:
        if self._file is None:
            system, path = _resolve(self._url)
            if self._streamed:
                self._file = system.open(path, "rb", block_size=0)
                self._skip_to_position()
            else:
                self._file = system.open(path, "rb")
                if self._position:
                    self._file.seek(self._position)
        return self._file.read(size)

    def _skip_to_position(self) -> None:
        """Reads and discards what was read before, for servers that only send whole files."""
        remaining = self._position
        while remaining:
            data = self._file.read(min(remaining, _MAX_READ))
            if not data:
                raise OSError(f"the file ends before byte {self._position}, which was read before")
            remaining -= len(data)

    def _close_file(self) -> None:
        with contextlib.suppress(Exception):  # the connection may be broken
            if self._file is not None:
                self._file.close()
        self._file = None

    def close(self) -> None:
        self._close_file()
        super().close()


def _resolve(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL and the path in it."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        return url_to_fs(url, **(_http_options() if _is_http(url) else {}))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        advice = f"run pip install 'dualsm[{extra}]'" if extra else str(error)
        raise UserError(f"{url}: a package for {protocol}:// is not installed; {advice}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; use a protocol that fsspec supports") from error


def _http_options() -> dict[str, Any]:
    """Returns options of fsspec's HTTP file system: no limit on the time of a download, no compression.

    Its default cache drops bytes that were not read yet, and requests them again.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT)
    return {
        "client_kwargs": {"timeout": timeout},
        "headers": {"Accept-Encoding": "identity"},
        "cache_type": "readahead",
    }


@contextlib.contextmanager
def _one_line(url: str) -> Iterator[None]:
    """Turns the various errors of network libraries into one."""
    try:
        yield
    except (UserError, BucketError):
        raise
    except FileNotFoundError as error:
        if _is_unreachable(error):
            raise BucketError(errno.EIO, _reason(error.__cause__), url) from error
        raise UserError(f"{url} does not exist; check the URL") from error
    except (ValueError, NotImplementedError) as error:  # the URL has another form than its protocol requires
        raise UserError(f"{url}: {_reason(error)}; check the URL") from error
    except Exception as error:
        raise BucketError(errno.EIO, _reason(error), url) from error


def _is_unreachable(error: FileNotFoundError) -> bool:
    """Returns True if a connection failed, for which fsspec's HTTP file system raises the same error."""
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
        return False
    return isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
