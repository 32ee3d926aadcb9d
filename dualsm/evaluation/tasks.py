"""Zero-shot tasks in the formats they are published in, read from disk; nothing is downloaded.

A task is a list of questions; a question is a list of (context, completion) pairs of which one is right. All
are asked in cloze form, the answers being scored as text, since small models cannot answer by letter.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dualsm.errors import UserError
from dualsm.evaluation.scoring import Item


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
      neutral: that context; None where it makes no sense.
      splits: of several files, those with the first of these in their names are read. The test split
        where its answers are public, else the validation split.
    """

    parse: Callable[[Any], Question]
    main: str
    neutral: str | None = "Answer:"
    splits: tuple[str, ...] = ("test", "val", "dev")


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
    return _lettered(value, f"Question: {_stem(value)}\nAnswer:")


def _openbookqa(value) -> Question:
    return _lettered(value, _stem(value))


def _piqa(value) -> Question:
    context = f"Question: {_text(value['goal'])}\nAnswer:"
    return _question(context, [value["sol1"], value["sol2"]], _gold(value["label"]))


def _siqa(value) -> Question:
    context = f"Q: {_text(value['context'])} {_text(value['question'])}\nA:"
    answers = [value["answerA"], value["answerB"], value["answerC"]]
    return _question(context, answers, _gold(value["label"], "ABC", first=1))


def _mmlu(value) -> Question:
    context = f"Question: {_text(value['question']).strip()}\nAnswer:"
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
_HIDDEN_TEST = ("val", "dev")  # for tasks whose test answers are not public

TASKS = {
    "blimp": Task(_blimp, "acc", neutral=None, splits=()),
    "hellaswag": Task(_hellaswag, "acc_norm", splits=_HIDDEN_TEST),
    "arc_easy": Task(_arc, "acc_norm"),
    "arc_challenge": Task(_arc, "acc_uncond"),
    "piqa": Task(_piqa, "acc_norm", splits=_HIDDEN_TEST),
    "openbookqa": Task(_openbookqa, "acc_uncond"),
    "siqa": Task(_siqa, "acc_norm", splits=_HIDDEN_TEST),
    "commonsenseqa": Task(_arc, "acc_uncond", splits=_HIDDEN_TEST),
    "mmlu": Task(_mmlu, "acc_norm"),
}


def load_task(name: str, folder: str | Path, limit: int = 0) -> list[Question]:
    """The questions of a task.

    Args:
      name: of the task.
      folder: holds `<name>/` with .jsonl files (MMLU: or .csv), or `<name>.jsonl`.
      limit: at most this many, spread evenly over the files; 0: all.

    Raises:
      UserError: when there is no such task or file, or a line cannot be read, with file and line.
    """
    if name not in TASKS:
        raise UserError(f"--tasks: {name!r} is none of {', '.join(TASKS)}")
    questions = [_parse(name, row) for path in _files(name, Path(folder)) for row in _rows(path)]
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
    if not all(item.completion.strip() for item in question.items):
        raise UserError(f"{row.path}, line {row.line}: an empty answer cannot be scored")
    return question


def _files(name: str, folder: Path) -> list[Path]:
    alone = folder / f"{name}.jsonl"
    if alone.is_file():
        return [alone]
    suffixes = (".jsonl", ".csv") if name == "mmlu" else (".jsonl",)
    inside = folder / name
    paths = sorted(path for path in inside.rglob("*") if path.suffix in suffixes and path.is_file())
    if not paths:
        raise UserError(f"--task_data={folder} has neither {name}.jsonl nor {name}/*{' or '.join(suffixes)}")
    for split in TASKS[name].splits:
        in_name = re.compile(rf"(^|[^a-z]){split}")
        chosen = [path for path in paths if in_name.search(str(path.relative_to(inside)).lower())]
        if chosen:
            return chosen
    return paths


def _rows(path: Path) -> Iterator[Row]:
    return _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
                if len(line) > _LONGEST_LINE:
                    raise UserError(f"{path}, line {number} is longer than {_LONGEST_LINE >> 20} MiB")
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}, line {number}: no UTF-8 ({error})") from error
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
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
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
