"""Input files of `prepare`: which files a flag names, and how they are read according to their suffixes."""

from __future__ import annotations

import glob
import json
import os
import posixpath
import sysconfig
from concurrent import futures
from pathlib import Path

from dualsm.data import streams
from dualsm.data.corpus import MANIFEST
from dualsm.process.errors import UserError
from dualsm.process.paths import files_in, glob_in_bucket, is_hidden, is_remote, user_path
from dualsm.process.progress import say
from dualsm.process.urls import (
    file_name,
    find_files,
    input_size,
    is_existing_path,
    is_glob,
    is_url,
    open_input,
    without_queries,
)

PYTHON_STDLIB = "python-stdlib"
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
BABYLM_SUFFIXES = (".train", ".dev", ".test")  # text files with many documents each
TEXT_SUFFIXES = (".txt", *BABYLM_SUFFIXES)
COLUMN_SUFFIXES = (".parquet", ".arrow")
DELIMITED_SUFFIXES = (".csv", ".tsv")
STREAM_SUFFIXES = (*JSON_SUFFIXES, *TEXT_SUFFIXES, *DELIMITED_SUFFIXES)  # these may be compressed
SUFFIXES = (*STREAM_SUFFIXES, *COLUMN_SUFFIXES, ".bin")
FORMATS = ("auto", "text", "json", "csv", "tsv")  # of `--format`
_FORMAT_OF_SUFFIX = (
    dict.fromkeys(JSON_SUFFIXES, "json")
    | dict.fromkeys(TEXT_SUFFIXES, "text")
    | dict.fromkeys(COLUMN_SUFFIXES, "columns")
    | {".csv": "csv", ".tsv": "tsv", ".bin": "ids"}
)
_UNKNOWN_BYTES = 1 << 30  # assumed text of a file of unknown size
_THREADS = 16  # hide the latency of a bucket
_EXPANSION = dict.fromkeys(streams.COMPRESSIONS, 4) | {".parquet": 3, ".bin": 2}  # rough text bytes per byte


def find_inputs(
    pattern: str, flag: str = "--input", file_format: str = "auto", quiet: bool = True
) -> list[str]:
    """Returns the files that a pattern matches, in a fixed order.

    Args:
      pattern: `python-stdlib`, or comma-separated paths, URLs and globs (`**` matches any number of
        directories). A directory, also one that a glob matches, is a dataset saved by Hugging Face
        `datasets`, or stands for the files in it and in its subdirectories, also those that are symbolic
        links, except hidden files, corpora and files without a suffix in `SUFFIXES`. A local path that exists
        is never interpreted as a glob or a list.
      flag: name of the flag, for error messages.
      file_format: one of `FORMATS`; unless it is "auto", files may have any suffix.
      quiet: do not say which files of a directory are ignored.

    Raises:
      UserError: if a part of the pattern matches no file, a file has an unknown suffix, or a directory cannot
        be read.
    """
    if pattern == PYTHON_STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "__pycache__"}
        paths = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
        return [str(p) for p in sorted(paths) if p.stat().st_size > 0]
    paths = []
    for part in [pattern] if is_existing_path(pattern) else filter(None, pattern.split(",")):
        path = part if is_remote(part) else os.path.expanduser(part)
        if is_url(path):
            matches, folders = find_files(path)
            is_named = not is_glob(path)
        elif is_named := user_path(path).is_dir():
            matches, folders = [], {str(user_path(path)): list(map(str, files_in(path)))}
        else:
            matches, folders = _matches(path)
        for folder, files in folders.items():
            matches += _files_of_folder(files, folder, flag, file_format, quiet, is_named)
        if not matches:
            raise UserError(f"{flag}: no files match {part!r}; check the path or quote the glob")
        paths += matches
    if not paths:
        raise UserError(f"{flag} is empty; pass files, globs or python-stdlib")
    for path in paths if file_format == "auto" else ():
        if file_suffix(path) not in SUFFIXES:
            raise UserError(
                f"{flag}: {path} has none of the suffixes {', '.join(SUFFIXES)}; text, JSON and CSV may be "
                f"compressed ({', '.join(streams.COMPRESSIONS)}), and --format=text reads any text file"
            )
    return list(dict.fromkeys(paths))


def file_suffix(path: str) -> str:
    """Returns the suffix that determines the format of a file, without the suffix of its compression.

    The suffix is empty for compressed files of formats other than text, JSON and CSV.
    """
    stem, suffix = os.path.splitext(file_name(path).lower())
    if suffix not in streams.COMPRESSIONS:
        return suffix
    suffix = os.path.splitext(stem)[1]
    return suffix if suffix in STREAM_SUFFIXES else ""


def format_of(path: str, file_format: str = "auto") -> str:
    """Returns the format of a file: text, json, csv, tsv, columns (Parquet, Arrow) or ids (Megatron-LM)."""
    if file_format != "auto":
        return file_format
    return _FORMAT_OF_SUFFIX.get(file_suffix(path), "text")  # the .py files of python-stdlib are text


def absolute_path(path: str) -> str:
    """Returns a path that is equal for all spellings of a local path; a URL is returned unchanged."""
    return path if is_remote(path) else os.path.realpath(path)


def input_bytes(paths: list[str]) -> int:
    """Returns the total size of files on disk."""
    return sum(size for size, *_ in file_versions(paths))


def file_versions(paths: list[str]) -> list[tuple[int, ...]]:
    """Returns the size of each file in bytes, and numbers that change when it is written."""
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(input_size, paths))


def estimated_text_bytes(paths: list[str], quiet: bool = True) -> int:
    """Returns a rough estimate of the text in the files, for choosing the number of shards.

    Args:
      paths: the files. A file at a URL whose size is unknown counts as `_UNKNOWN_BYTES`.
      quiet: do not warn of unknown sizes.
    """
    sizes = [size for size, *_ in file_versions(paths)]
    unknown = [path for path, size in zip(paths, sizes, strict=True) if not size and is_url(path)]
    if unknown and not quiet:
        say(
            f"warning: the size of {without_queries(unknown[0])} is unknown (files: {len(unknown)}); prepare "
            f"needs more memory if a file has more than {_UNKNOWN_BYTES >> 30} GiB of text"
        )
    factors = [_EXPANSION.get(os.path.splitext(file_name(path))[1], 1) for path in paths]
    known = sum(size * factor for size, factor in zip(sizes, factors, strict=True))
    return known + len(unknown) * _UNKNOWN_BYTES


def _matches(part: str) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the files of a path or glob, and all files in each folder that it matches; see `find_files`.

    The leading directories that exist are not part of the glob.
    """
    if user_path(part).exists():
        return _files([part]), {}
    if is_remote(part):
        matches, folders = glob_in_bucket(part)
    else:
        found = _local_glob(part)
        matches, folders = _files(found), list(filter(os.path.isdir, found))
    if "**" in part:
        folders = []
    return matches, {folder: list(map(str, files_in(folder))) for folder in folders}


def _local_glob(part: str) -> list[str]:
    """Returns the local paths that a glob matches, sorted."""
    folder, names = "", part.split("/")
    while len(names) > 1 and os.path.isdir(f"{folder}{names[0]}/"):
        folder += f"{names.pop(0)}/"
    found = glob.glob("/".join(names), root_dir=folder or None, recursive=True)
    return [folder + name for name in sorted(found)]


def _files(paths: list[str]) -> list[str]:
    """Returns the paths that are files."""
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_is_file, paths))
    return [path for path, is_file in zip(paths, found, strict=True) if is_file]


def _is_file(path: str) -> bool:
    """Returns True for a file or an object, but not for a named pipe, which `epath.Path.is_file` accepts."""
    return user_path(path).is_file() if is_remote(path) else os.path.isfile(path)


class _NoInputs(UserError):
    """Raised for a folder without input files."""


def _files_of_folder(
    paths: list[str], folder: str, flag: str, file_format: str, quiet: bool, is_named: bool
) -> list[str]:
    """Returns the files of a saved dataset, or the input files, among all files of a folder.

    A folder without input files is an error if it is named, and ignored if a glob matches it.
    """
    try:
        return _find_in_folder(paths, folder, flag, file_format, quiet)
    except _NoInputs as error:
        if is_named:
            raise
        if not quiet:
            say(f"ignored a folder: {error}")
        return []


def _find_in_folder(paths: list[str], folder: str, flag: str, file_format: str, quiet: bool) -> list[str]:
    """Returns the same; raises `_NoInputs` if there are none."""
    path_of = {_name_in(folder, path): path for path in paths}
    if "dataset_dict.json" in path_of:
        raise UserError(f"{flag}: {folder} contains several splits; pass one of them, such as {folder}/train")
    if "state.json" in path_of:
        return _saved_dataset(path_of["state.json"], folder, flag)
    hidden = [name for name in path_of if any(map(is_hidden, name.split("/")))]
    for name in hidden:
        del path_of[name]
    manifests = [name for name in path_of if posixpath.basename(name) == MANIFEST]
    corpora = tuple(name.removesuffix(MANIFEST) for name in manifests if _is_manifest(path_of[name]))
    if "" in corpora:
        raise _NoInputs(f"{flag}: {folder} is a corpus; pass the text that it was made from")
    texts = {name: path for name, path in path_of.items() if not name.startswith(corpora)}
    return _inputs_of_folder(texts, folder, flag, file_format, quiet)


def _name_in(folder: str, path: str) -> str:
    """Returns the path of a file relative to its folder."""
    return path.removeprefix(folder).strip("/") if is_remote(folder) else os.path.relpath(path, folder)


def _is_manifest(path: str) -> bool:
    """Returns True for the manifest of a corpus, whose files are not input."""
    try:
        with open_input(path) as file:
            manifest = json.load(file)
    except ValueError:
        return False
    return isinstance(manifest, dict) and {"identity", "tokenizer_sha256", "splits"} <= manifest.keys()


def _inputs_of_folder(
    path_of: dict[str, str], folder: str, flag: str, file_format: str, quiet: bool
) -> list[str]:
    """Returns the input files among the files of a folder, given by their names in it."""
    chosen = [path for path in path_of.values() if file_format != "auto" or file_suffix(path) in SUFFIXES]
    if not chosen:
        raise _NoInputs(
            f"{flag}: {folder} contains no files with the suffixes {', '.join(SUFFIXES)}; check the path, or "
            "pass --format=text to read other text files"
        )
    indexes = {f"{os.path.splitext(path)[0]}.idx" for path in chosen if path.endswith(".bin")}
    ignored = [name for name, path in path_of.items() if path not in {*chosen, *indexes}]
    if ignored and not quiet:
        say(f"{folder}: ignored files with other suffixes ({len(ignored)}), such as {ignored[0]}")
    return chosen


def _saved_dataset(state: str, folder: str, flag: str) -> list[str]:
    """Returns the files of a dataset written by `Dataset.save_to_disk`, in the order of the dataset."""
    try:
        with open_input(state) as file:
            names = [posixpath.basename(entry["filename"]) for entry in json.load(file)["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag}: {state} is damaged ({error!r}); save the dataset again") from error
    return [f"{folder}/{name}" for name in names]
