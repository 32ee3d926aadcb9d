"""Loads the questions of zero-shot tasks from local files."""

from __future__ import annotations

import collections
import csv
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from dualsm.data.text import foreign_encoding, likely_encoding, parse_json, without_bom
from dualsm.evaluation.task_formats import TASKS, Question
from dualsm.process.errors import UserError
from dualsm.process.paths import files_in, is_hidden, open_binary, user_path

_MAX_LINE_BYTES = 16 << 20
_MAX_NAMED_FILES = 4


class TaskRecord(NamedTuple):
    """A parsed line of a task file, with its location."""

    value: Any
    path: epath.Path
    line: int


def load_task(name: str, folder: epath.PathLike, limit: int = 0) -> list[Question]:
    """Loads the questions of a task.

    Args:
      name: name of the task.
      folder: folder that contains `<name>/*.jsonl` (for MMLU also .csv) or `<name>.jsonl`.
      limit: maximum number of questions, spread evenly over the files; 0: all.

    Raises:
      UserError: if the task is unknown, has no files, a line cannot be parsed, or two files contain the same
        questions.
    """
    by_file = {path: read_questions(name, path) for path in task_files(name, folder)}
    _check_duplicates(by_file)
    questions = [question for part in by_file.values() for question in part]
    if not questions:
        raise UserError(f"{folder}: the files of task {name} contain no questions; check --task_data")
    if limit:
        count = min(limit, len(questions))
        questions = [questions[i * len(questions) // count] for i in range(count)]
    return questions


def read_questions(name: str, path: epath.Path) -> list[Question]:
    """Returns the questions of one file of a task. Raises `UserError` if a line cannot be parsed."""
    return [_parse(name, record) for record in _records(path)]


def _parse(name: str, record: TaskRecord) -> Question:
    where = f"{record.path}, line {record.line}"
    try:
        question = TASKS[name].parse(record.value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: not in the format of {name} ({reason})") from error
    try:
        json.dumps([*question.items, question.group], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not valid Unicode (a lone surrogate); remove it") from error
    if not all(item.completion.strip() for item in question.items):
        raise UserError(f"{where}: an answer is empty; remove the question")
    return question


def _check_duplicates(by_file: dict[epath.Path, list[Question]]) -> None:
    """Raises `UserError` if more than half of a file's questions are also in another file."""
    first: dict[Question, epath.Path] = {}
    for path, questions in by_file.items():
        duplicates = collections.Counter(first[question] for question in questions if question in first)
        if 2 * duplicates.total() > len(questions):
            other = duplicates.most_common(1)[0][0]
            raise UserError(
                f"{path}: {duplicates.total()} questions are also in {other}; remove one of the two files"
            )
        first |= dict.fromkeys(questions, path)


def task_files(name: str, folder: epath.PathLike, flag: str = "--task_data") -> list[epath.Path]:
    """Returns the files that contain the questions of a task.

    Hidden files and folders (such as `.ipynb_checkpoints`) and editors' backup files are ignored. A file
    belongs to the split that its name contains; a file without a split in its name, to the split that its
    folder is named after.

    Raises:
      UserError: if the task is unknown or has no files.
    """
    if name not in TASKS:
        raise UserError(f"--tasks: unknown task {name!r}; choose from {', '.join(TASKS)}")
    folder = user_path(folder)
    single = folder / f"{name}.jsonl"
    if single.is_file():
        return [single]
    suffixes = (".jsonl", ".csv") if name == "mmlu" else (".jsonl",)
    inside = folder / name
    paths = [
        path
        for path in files_in(inside)
        if path.suffix.lower() in suffixes and not any(map(is_hidden, path.relative_to(inside).parts))
    ]
    if not paths:
        raise UserError(f"{flag}={folder} contains neither {name}.jsonl nor {name}/*{' or '.join(suffixes)}")
    for split in TASKS[name].splits:
        in_name = re.compile(rf"(^|[^a-z]){split}")
        if chosen := [path for path in paths if in_name.search(path.stem.lower())]:
            return chosen
    for split in TASKS[name].splits:
        is_folder = re.compile(rf"{split}(s|id|idation|elopment)?")
        if chosen := [path for path in paths if is_folder.fullmatch(path.parent.name.lower())]:
            return chosen
    return paths


def describe_files(paths: Sequence[epath.Path]) -> str:
    """Returns the names of a few files, or the number of files with the first and last name."""
    if len(paths) <= _MAX_NAMED_FILES:
        return ", ".join(map(str, paths))
    return f"{len(paths)} files, {paths[0]} to {paths[-1].name}"


def _records(path: epath.Path) -> Iterator[TaskRecord]:
    return _csv_records(path) if path.suffix.lower() == ".csv" else _json_records(path)


def _lines(path: epath.Path) -> Iterator[str]:
    """Yields the lines of a file, without byte-order marks."""
    try:
        with open_binary(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b""), 1):
                if len(line) > _MAX_LINE_BYTES:
                    raise UserError(f"{path}, line {number}: longer than {_MAX_LINE_BYTES >> 20} MiB")
                try:
                    text = without_bom(line).decode("utf-8")
                except UnicodeDecodeError:
                    text = None
                if text is None or (number == 1 and foreign_encoding(line)):
                    encoding = likely_encoding(line)
                    raise UserError(
                        f"{path}, line {number}: not UTF-8, but {encoding}; convert the file to UTF-8"
                    )
                yield text
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _json_records(path: epath.Path) -> Iterator[TaskRecord]:
    labels_path = path.with_name(f"{path.stem}-labels.lst")  # PIQA and SIQA publish labels separately
    labels = "".join(_lines(labels_path)).split() if labels_path.is_file() else None
    number = 0
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        if labels is not None:
            if number > len(labels):
                raise UserError(
                    f"{labels_path} has {len(labels)} labels, but {path} has more lines; copy both again"
                )
            value["label"] = labels[number - 1]
        yield TaskRecord(value, path, number)
    if labels is not None and len(labels) > number:
        raise UserError(
            f"{labels_path} has {len(labels)} labels, but {path} has {number} lines; copy both files again"
        )


def _csv_records(path: epath.Path) -> Iterator[TaskRecord]:
    """Reads MMLU's CSV files: question, four choices, letter; the file name contains the subject."""
    subject = re.sub("_(test|val|dev)$", "", path.stem)
    reader = csv.reader(_lines(path), strict=True)
    try:
        for cells in filter(None, reader):
            if len(cells) != 6:
                raise UserError(f"{path}, line {reader.line_num}: {len(cells)} columns instead of 6")
            value = {"question": cells[0], "choices": cells[1:5], "answer": cells[5], "subject": subject}
            yield TaskRecord(value, path, reader.line_num)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error
