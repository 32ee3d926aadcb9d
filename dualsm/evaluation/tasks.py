"""Zero-shot tasks in the formats they are published in, read from disk; nothing is downloaded.

A task is a list of questions; a question is a list of (context, completion) pairs of which one is right. All
are asked in cloze form, the answers being scored as text, since small models cannot answer by letter.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
      parse: from a line's value to a question; may raise KeyError, IndexError, TypeError, ValueError.
      main: the metric to report first: "acc" (sum of log p), "acc_norm" (divided by the answer's bytes) or
        "acc_uncond" (minus that of the answer after a neutral context).
      neutral: that context; None where it makes no sense.
    """

    parse: Callable[[Any], Question]
    main: str
    neutral: str | None = "Answer:"


def _blimp(value) -> Question:
    good, bad = str(value["sentence_good"]), str(value["sentence_bad"])
    return Question((Item("", good), Item("", bad)), 0, str(value.get("UID", "")))


def _hellaswag(value) -> Question:
    # As published a row has ctx_a and ctx_b; some copies have only their join.
    context = value["ctx"]
    if "ctx_a" in value:
        context = f"{value['ctx_a']} {str(value['ctx_b']).capitalize()}".strip()
    context = _plain(f"{value['activity_label']}: {context}")
    endings = [_plain(ending) for ending in value["endings"]]
    return _question(context, endings, int(value["label"]))


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
    return _question(context, texts, list(labels).index(value["answerKey"]))


def _stem(value) -> str:
    question = value.get("question", value.get("question_stem"))
    return question["stem"] if isinstance(question, dict) else str(question)


def _arc(value) -> Question:
    return _lettered(value, f"Question: {_stem(value)}\nAnswer:")


def _openbookqa(value) -> Question:
    return _lettered(value, _stem(value))


def _piqa(value) -> Question:
    return _question(
        f"Question: {value['goal']}\nAnswer:", [value["sol1"], value["sol2"]], int(value["label"])
    )


def _siqa(value) -> Question:
    answers = [value["answerA"], value["answerB"], value["answerC"]]
    label = value["label"]
    gold = "ABC".index(label) if str(label) in "ABC" else int(label) - 1
    return _question(f"Q: {value['context']} {value['question']}\nA:", answers, gold)


def _mmlu(value) -> Question:
    answer = value["answer"]
    gold = "ABCD".index(answer) if str(answer) in "ABCD" else int(answer)
    question = _question(f"Question: {value['question'].strip()}\nAnswer:", value["choices"], gold)
    return question._replace(group=str(value.get("subject", "")))


def _question(context: str, answers: Sequence[str], gold: int) -> Question:
    if not 0 <= gold < len(answers):
        raise ValueError(f"answer {gold} of {len(answers)}")
    return Question(tuple(Item(context, f" {str(answer).strip()}") for answer in answers), gold)


TASKS = {
    "blimp": Task(_blimp, "acc", neutral=None),
    "hellaswag": Task(_hellaswag, "acc_norm"),
    "arc_easy": Task(_arc, "acc_norm"),
    "arc_challenge": Task(_arc, "acc_uncond"),
    "piqa": Task(_piqa, "acc_norm"),
    "openbookqa": Task(_openbookqa, "acc_uncond"),
    "siqa": Task(_siqa, "acc_norm"),
    "commonsenseqa": Task(_arc, "acc_uncond"),
    "mmlu": Task(_mmlu, "acc_norm"),
}


def load_task(name: str, folder: str | Path, limit: int = 0) -> list[Question]:
    """The questions of a task.

    Args:
      name: of the task.
      folder: holds `<name>/` with .jsonl or .csv files, or `<name>.jsonl`.
      limit: at most this many; 0: all.

    Raises:
      UserError: when there is no such task or file, or a line cannot be read, with file and line.
    """
    if name not in TASKS:
        raise UserError(f"--tasks: {name!r} is none of {', '.join(TASKS)}")
    questions = []
    for row in _rows(name, Path(folder)):
        if limit and len(questions) == limit:
            break
        try:
            question = TASKS[name].parse(row.value)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{row.path}, line {row.line}: not in the format of {name} ({reason})") from error
        if not all(item.completion.strip() for item in question.items):
            raise UserError(f"{row.path}, line {row.line}: an empty answer cannot be scored")
        questions.append(question)
    if not questions:
        raise UserError(f"{folder}: task {name} has no questions")
    return questions


def _rows(name: str, folder: Path) -> Iterator[Row]:
    paths = [folder / f"{name}.jsonl"]
    if not paths[0].is_file():
        paths = sorted(p for p in (folder / name).glob("**/*") if p.suffix in (".jsonl", ".csv"))
    if not paths:
        raise UserError(f"--task_data={folder} has neither {name}.jsonl nor {name}/*.jsonl")
    for path in paths:
        yield from _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)


def _json_rows(path: Path) -> Iterator[Row]:
    labels = path.with_name(f"{path.stem}-labels.lst")  # as PIQA and SIQA are published
    golds = labels.read_text().split() if labels.is_file() else None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error})") from error
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: no JSON object")
            if golds is not None:
                if number > len(golds):
                    raise UserError(f"{labels} ends before line {number} of {path}")
                value["label"] = golds[number - 1]
            yield Row(value, path, number)


def _csv_rows(path: Path) -> Iterator[Row]:
    """MMLU as published: question, four choices, letter; the subject is the file's name."""
    with path.open(newline="", encoding="utf-8") as file:
        for number, cells in enumerate(csv.reader(file), 1):
            if len(cells) != 6:
                raise UserError(f"{path}, line {number}: {len(cells)} columns, not 6")
            subject = path.stem.removesuffix("_test").removesuffix("_val").removesuffix("_dev")
            value = {"question": cells[0], "choices": cells[1:5], "answer": cells[5], "subject": subject}
            yield Row(value, path, number)


class Judgement(NamedTuple):
    """Accuracy of a task under one metric, in [0, 1].

    Attributes:
      accuracy: share of questions answered rightly.
      stderr: its standard error.
      normalised: 100 * (accuracy - chance) / (1 - chance); 0 is guessing, 100 perfect.
    """

    accuracy: float
    stderr: float
    normalised: float


def judge(
    questions: Sequence[Question], scores: Sequence[np.ndarray], unconditional: Sequence[np.ndarray] | None
) -> dict[str, Judgement]:
    """Judges the answers by every metric that applies.

    Args:
      questions: of a task.
      scores: log-likelihood of each answer, one array a question.
      unconditional: the same after a neutral context, or None.

    Returns:
      "acc", "acc_norm", and with `unconditional` "acc_uncond".
    """
    sizes = [np.array([len(item.completion.strip().encode()) for item in q.items]) for q in questions]
    by_metric = {
        "acc": scores,
        "acc_norm": [score / size for score, size in zip(scores, sizes, strict=True)],
    }
    if unconditional is not None:
        by_metric["acc_uncond"] = [a - b for a, b in zip(scores, unconditional, strict=True)]
    chance = float(np.mean([1 / len(question.items) for question in questions]))
    judgements = {}
    for metric, values in by_metric.items():
        right = np.array([int(np.argmax(v)) == q.gold for v, q in zip(values, questions, strict=True)])
        accuracy = float(right.mean())
        stderr = float(right.std(ddof=1) / math.sqrt(len(right))) if len(right) > 1 else float("nan")
        judgements[metric] = Judgement(accuracy, stderr, 100 * (accuracy - chance) / (1 - chance))
    return judgements
