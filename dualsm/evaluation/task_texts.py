"""The texts of task files, for removing them from training data."""

from __future__ import annotations

import re

from etils import epath

from dualsm.data.decontamination import MIN_WORDS
from dualsm.data.words import words_of
from dualsm.evaluation.task_formats import TASKS, Question
from dualsm.evaluation.tasks import read_questions, task_files
from dualsm.process.errors import UserError
from dualsm.process.paths import user_path
from dualsm.process.urls import is_existing_path

_TEMPLATE = re.compile("^(Question|Answer|Q|A):", re.MULTILINE)  # words of prompts, not of the task


def read_task_texts(paths: str, flag: str = "--decontaminate") -> dict[str, list[str]]:
    """Returns the texts of task files: each question with each of its answers.

    These texts are given as in the prompt of `evaluate` and without the words that only the prompt adds. A
    question of at least `MIN_WORDS` words is also given without an answer.

    Args:
      paths: comma-separated folders and files. A folder contains the files of tasks, as for
        `evaluate --task_data`, or is the folder of one task; the split that `evaluate` reads is used. A file
        belongs to the task that it, or a folder that contains it, is named after.
      flag: name of the flag, for error messages.

    Raises:
      UserError: if there are no task files, or a line is not in the format of its task.
    """
    texts: dict[str, list[str]] = {}
    for part in [paths] if is_existing_path(paths) else filter(None, paths.split(",")):
        for name, path in _find(user_path(part), flag):
            texts[str(path)] = [text for question in read_questions(name, path) for text in _texts(question)]
    if not texts:
        raise UserError(f"{flag} is empty; pass folders or files of tasks")
    return texts


def _texts(question: Question) -> list[str]:
    prompts = [item.context + item.completion for item in question.items]
    contexts = [_TEMPLATE.sub("", item.context) for item in question.items]
    long = [context for context in contexts if len(words_of(context)) >= MIN_WORDS]
    return list(dict.fromkeys([*(_TEMPLATE.sub("", prompt) for prompt in prompts), *prompts, *long]))


def _find(path: epath.Path, flag: str) -> list[tuple[str, epath.Path]]:
    """Returns the task files in a folder, or a task file, each with the name of its task."""
    if path.is_dir():
        names = [name for name in TASKS if (path / f"{name}.jsonl").is_file() or (path / name).is_dir()]
        found = [(name, file) for name in names for file in task_files(name, path, flag)]
        if not found and path.name in TASKS:
            found = [(path.name, file) for file in task_files(path.name, path.parent, flag)]
        if not found:
            raise UserError(f"{flag}: {path} contains no files of the tasks {', '.join(TASKS)}")
        return found
    if not path.is_file():
        raise UserError(f"{flag}: {path} does not exist; check the path")
    name = next((name for name in (path.stem, *(p.name for p in path.parents)) if name in TASKS), None)
    if name is None:
        raise UserError(
            f"{flag}: {path} belongs to no known task; name the file or its folder after one of "
            f"{', '.join(TASKS)}"
        )
    return [(name, path)]
