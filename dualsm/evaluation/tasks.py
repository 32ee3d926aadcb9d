"""Zero-shot tasks in the formats they are published in, read from disk; nothing is downloaded.

A task is a list of questions; a question is a list of (context, completion) pairs of which one is right. All
are asked in cloze form, the answers being scored as text, since small models cannot answer by letter.
"""

from __future__ import annotations

import collections
import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dualsm.data.text import foreign_encoding, likely_encoding, parse_json, without_bom
from dualsm.evaluation.scoring import Item
from dualsm.process.errors import UserError


class Question(NamedTuple):
    """One question.

    Attributes:
      items: one a possible answer.
      gold: which of them is right.
      group: what it belongs to within the task (paradigm, subject).
    """

    items: tuple[Item, ...]
    gold: int
    group: str = ""


class Row(NamedTuple):
    """A parsed line of a task file and where it stands."""

    value: Any
    path: Path
    line: int


class Task(NamedTuple):
    """How a task is read and judged.

    Attributes:
      parse: from a line's value to a question; may raise KeyError, TypeError, ValueError, AttributeError.
      main: the metric to report first: "acc" (sum of log p), "acc_norm" (divided by the answer's
        characters) or "acc_uncond" (minus that of the answer after a neutral context).
      neutral: that context, for "acc_uncond" only: the task's own prompt without the question.
      splits: of several files, those with the first of these in their names are read. The test split
        where its answers are public, else the validation split. A file with none of these in its name belongs
        to the split that its folder is named after.
    """

    parse: Callable[[Any], Question]
    main: str
    neutral: str | None = None
    splits: tuple[str, ...] = ("test", "val", "dev")


_ANSWER = "Answer:"  # the end of a prompt


def _blimp(value) -> Question:
    good, bad = _text(value["sentence_good"]), _text(value["sentence_bad"])
    return Question((Item("", good), Item("", bad)), 0, str(value.get("UID", "")))


def _hellaswag(value) -> Question:
    # As published a row has ctx_a and ctx_b; some copies have only their join.
    if "ctx_a" in value:
        context = f"{_text(value['ctx_a'])} {_text(value['ctx_b']).capitalize()}".strip()
    else:
        context = _text(value["ctx"])
    context = _plain(f"{_text(value['activity_label'])}: {context}")
    endings = [_plain(ending) for ending in _texts(value["endings"])]
    return _question(context, endings, _gold(value["label"]))


def _plain(text: str) -> str:
    """HellaSwag's text without WikiHow's marks, as the field reads it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _lettered(value, context: str) -> Question:
    """A question whose choices carry labels, as ARC, OpenBookQA and CommonsenseQA have them."""
    question = value.get("question")
    choices = question["choices"] if isinstance(question, dict) else value["choices"]
    if isinstance(choices, dict):  # columns, as in Hugging Face's copies
        texts, labels = choices["text"], choices["label"]
    else:  # a list of objects, as published
        texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    if len(labels) != len(texts):
        raise ValueError(f"{len(texts)} choices with {len(labels)} labels")
    return _question(context, texts, _texts(labels).index(value["answerKey"]))


def _stem(value) -> str:
    question = value["question"] if "question" in value else value["question_stem"]
    return _text(question["stem"] if isinstance(question, dict) else question)


def _arc(value) -> Question:
    return _lettered(value, f"Question: {_stem(value)}\n{_ANSWER}")


def _openbookqa(value) -> Question:
    return _lettered(value, _stem(value))


def _piqa(value) -> Question:
    context = f"Question: {_text(value['goal'])}\n{_ANSWER}"
    return _question(context, [value["sol1"], value["sol2"]], _gold(value["label"]))


def _siqa(value) -> Question:
    context = f"Q: {_text(value['context'])} {_text(value['question'])}\nA:"
    answers = [value["answerA"], value["answerB"], value["answerC"]]
    return _question(context, answers, _gold(value["label"], "ABC", first=1))


def _mmlu(value) -> Question:
    context = f"Question: {_text(value['question']).strip()}\n{_ANSWER}"
    question = _question(context, value["choices"], _gold(value["answer"], "ABCD"))
    return question._replace(group=str(value.get("subject", "")))


def _question(context: str, answers: Sequence[str], gold: int) -> Question:
    answers = [answer.strip() for answer in _texts(answers)]
    if len(answers) < 2:
        raise ValueError("fewer than two answers")
    if not 0 <= gold < len(answers):
        raise ValueError(f"the right answer is number {gold + 1} of {len(answers)}")
    return Question(tuple(Item(context, f" {answer}") for answer in answers), gold)


def _gold(label, letters: str = "", first: int = 0) -> int:
    """Which answer a label means: one of `letters`, or a number that counts from `first`."""
    if isinstance(label, str) and len(label) == 1 and label in letters:
        return letters.index(label)
    if isinstance(label, int | str) and re.fullmatch("-?[0-9]{1,9}", str(label)):
        return int(label) - first
    raise ValueError(f"the label {str(label)[:40]!r} is no number{letters and f' and none of {letters}'}")


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{json.dumps(value)[:40]} where a text should be")
    return value


def _texts(values) -> list[str]:
    if not isinstance(values, list):
        raise TypeError(f"{json.dumps(values)[:40]} where a list of texts should be")
    return [_text(value) for value in values]


_LONGEST_LINE = 16 << 20  # bytes
_NAMED_FILES = 4  # more are only counted
_HIDDEN_TEST = ("val", "dev")  # for tasks whose test answers are not public

TASKS = {
    "blimp": Task(_blimp, "acc", splits=()),
    "hellaswag": Task(_hellaswag, "acc_norm", splits=_HIDDEN_TEST),
    "arc_easy": Task(_arc, "acc_norm"),
    "arc_challenge": Task(_arc, "acc_uncond", neutral=_ANSWER),
    "piqa": Task(_piqa, "acc_norm", splits=_HIDDEN_TEST),
    "openbookqa": Task(_openbookqa, "acc_uncond", neutral=""),
    "siqa": Task(_siqa, "acc_norm", splits=_HIDDEN_TEST),
    "commonsenseqa": Task(_arc, "acc_uncond", neutral=_ANSWER, splits=_HIDDEN_TEST),
    "mmlu": Task(_mmlu, "acc_norm"),
}


def load_task(name: str, folder: str | Path, limit: int = 0) -> list[Question]:
    """The questions of a task.

    Args:
      name: of the task.
      folder: holds `<name>/` with .jsonl files (MMLU: or .csv), or `<name>.jsonl`.
      limit: at most this many, spread evenly over the files; 0: all.

    Raises:
      UserError: when there is no such task or file, a line cannot be read (with file and line), or two files
        hold the same questions.
    """
    by_file = {path: [_parse(name, row) for row in _rows(path)] for path in task_files(name, Path(folder))}
    _refuse_duplicates(by_file)
    questions = [question for part in by_file.values() for question in part]
    if not questions:
        raise UserError(f"{folder}: task {name} has no questions")
    if limit:
        count = min(limit, len(questions))
        questions = [questions[i * len(questions) // count] for i in range(count)]
    return questions


def _parse(name: str, row: Row) -> Question:
    try:
        question = TASKS[name].parse(row.value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{row.path}, line {row.line}: not in the format of {name} ({reason})") from error
    try:
        json.dumps([*question.items, question.group], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{row.path}, line {row.line}: no valid Unicode (half a surrogate pair)") from error
    if not all(item.completion.strip() for item in question.items):
        raise UserError(f"{row.path}, line {row.line}: an empty answer cannot be scored")
    return question


def _refuse_duplicates(by_file: dict[Path, list[Question]]) -> None:
    """Raises `UserError` when most questions of a file are in another file too, as in copies."""
    first: dict[Question, Path] = {}
    for path, questions in by_file.items():
        doubled = collections.Counter(first[question] for question in questions if question in first)
        if 2 * doubled.total() > len(questions):
            other = doubled.most_common(1)[0][0]
            raise UserError(
                f"{path} has {doubled.total()} questions that {other} has too; remove one of the two files"
            )
        first |= dict.fromkeys(questions, path)


def task_files(name: str, folder: str | Path) -> list[Path]:
    """Returns the files that the questions of a task are read from.

    Leaves out hidden files and folders, such as Jupyter's `.ipynb_checkpoints`, and copies that editors keep.

    Raises:
      UserError: when there is no such task or file.
    """
    if name not in TASKS:
        raise UserError(f"--tasks: {name!r} is none of {', '.join(TASKS)}")
    folder = Path(folder).expanduser()
    alone = folder / f"{name}.jsonl"
    if alone.is_file():
        return [alone]
    suffixes = (".jsonl", ".csv") if name == "mmlu" else (".jsonl",)
    inside = folder / name
    paths = sorted(
        path
        for path in inside.rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith((".", "~")) for part in path.relative_to(inside).parts)
        and path.is_file()
    )
    if not paths:
        raise UserError(f"--task_data={folder} has neither {name}.jsonl nor {name}/*{' or '.join(suffixes)}")
    for split in TASKS[name].splits:
        in_name = re.compile(rf"(^|[^a-z]){split}")
        if chosen := [path for path in paths if in_name.search(path.stem.lower())]:
            return chosen
    for split in TASKS[name].splits:
        is_folder = re.compile(rf"{split}(s|id|idation|elopment)?")
        if chosen := [path for path in paths if is_folder.fullmatch(path.parent.name.lower())]:
            return chosen
    return paths


def describe_files(paths: Sequence[Path]) -> str:
    """Returns one line about the files that were read: their names, or their number and folder."""
    if len(paths) <= _NAMED_FILES:
        return ", ".join(map(str, paths))
    return f"{len(paths)} files, {paths[0]} to {paths[-1].name}"


def _rows(path: Path) -> Iterator[Row]:
    return _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a file, without byte-order marks."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
                if len(line) > _LONGEST_LINE:
                    raise UserError(f"{path}, line {number} is longer than {_LONGEST_LINE >> 20} MiB")
                try:
                    text = without_bom(line).decode("utf-8")
                except UnicodeDecodeError:
                    text = None
                if text is None or (number == 1 and foreign_encoding(line)):
                    reason = f"no UTF-8, but {likely_encoding(line)}; convert the file"
                    raise UserError(f"{path}, line {number}: {reason}")
                yield text
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _json_rows(path: Path) -> Iterator[Row]:
    beside = path.with_name(f"{path.stem}-labels.lst")  # as PIQA and SIQA are published
    labels = "".join(_lines(beside)).split() if beside.is_file() else None
    number = 0
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON ({error})") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number}: no JSON object")
        if labels is not None:
            if number > len(labels):
                raise UserError(f"{beside} ends before line {number} of {path}")
            value["label"] = labels[number - 1]
        yield Row(value, path, number)
    if labels is not None and len(labels) > number:
        raise UserError(f"{beside} has {len(labels)} labels for the {number} lines of {path}")


def _csv_rows(path: Path) -> Iterator[Row]:
    """MMLU as published: question, four choices, letter; the subject is the file's name."""
    subject = re.sub("_(test|val|dev)$", "", path.stem)
    reader = csv.reader(_lines(path), strict=True)
    try:
        for cells in filter(None, reader):
            if len(cells) != 6:
                raise UserError(f"{path}, line {reader.line_num}: {len(cells)} columns, not 6")
            value = {"question": cells[0], "choices": cells[1:5], "answer": cells[5], "subject": subject}
            yield Row(value, path, reader.line_num)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: no CSV ({error})") from error
