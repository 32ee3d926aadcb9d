"""Zero-shot tasks: parsers for their published formats, prompts and main metrics.

A question is a list of (context, completion) pairs, one per answer. Answers are scored as text (cloze form),
because small models cannot answer multiple-choice questions by letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dualsm.evaluation.scoring import Item


class Question(NamedTuple):
    """A question with its possible answers.

    Attributes:
      items: one per answer.
      gold: index of the correct answer.
      group: paradigm or subject within the task.
    """

    items: tuple[Item, ...]
    gold: int
    group: str = ""


class Task(NamedTuple):
    """Format and main metric of a task.

    Attributes:
      parse: converts the value of a line to a question; raises KeyError, TypeError, ValueError or
        AttributeError if the value has another format.
      metric: the main metric; "acc" compares log-likelihoods, "acc_norm" divides them by the number of
        characters of the answer, "acc_uncond" subtracts the answer's log-likelihood after a neutral context.
      neutral: the neutral context for "acc_uncond": the task's prompt without the question.
      splits: splits in order of preference; the first one for which files exist is read. The test split if
        its answers are public, else the validation split.
      pairs: True if the answers are two whole sentences, whose lengths and words may differ.
    """

    parse: Callable[[Any], Question]
    metric: str
    neutral: str | None = None
    splits: tuple[str, ...] = ("test", "val", "dev")
    pairs: bool = False


_ANSWER = "Answer:"


def _parse_blimp(value) -> Question:
    good, bad = _text(value["sentence_good"]), _text(value["sentence_bad"])
    return Question((Item("", good), Item("", bad)), 0, str(value.get("UID", "")))


def _parse_hellaswag(value) -> Question:
    if "ctx_a" in value:  # some copies have only `ctx`, which joins `ctx_a` and `ctx_b`
        context = f"{_text(value['ctx_a'])} {_text(value['ctx_b']).capitalize()}".strip()
    else:
        context = _text(value["ctx"])
    context = _strip_markup(f"{_text(value['activity_label'])}: {context}")
    endings = [_strip_markup(ending) for ending in _texts(value["endings"])]
    return _question(context, endings, _gold(value["label"]))


def _strip_markup(text: str) -> str:
    """Removes WikiHow's markup from HellaSwag's text, with the same rules as lm-evaluation-harness."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _labeled_choices(value, context: str) -> Question:
    """Returns a question whose choices have labels (ARC, OpenBookQA, CommonsenseQA)."""
    question = value.get("question")
    choices = question["choices"] if isinstance(question, dict) else value["choices"]
    if isinstance(choices, dict):  # two lists, as in Hugging Face's copies
        texts, labels = choices["text"], choices["label"]
    else:  # a list of objects, as published
        texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    if len(labels) != len(texts):
        raise ValueError(f"{len(texts)} choices but {len(labels)} labels")
    return _question(context, texts, _texts(labels).index(value["answerKey"]))


def _stem(value) -> str:
    question = value["question"] if "question" in value else value["question_stem"]
    return _text(question["stem"] if isinstance(question, dict) else question)


def _parse_arc(value) -> Question:
    return _labeled_choices(value, f"Question: {_stem(value)}\n{_ANSWER}")


def _parse_openbookqa(value) -> Question:
    return _labeled_choices(value, _stem(value))


def _parse_piqa(value) -> Question:
    context = f"Question: {_text(value['goal'])}\n{_ANSWER}"
    return _question(context, [value["sol1"], value["sol2"]], _gold(value["label"]))


def _parse_siqa(value) -> Question:
    context = f"Q: {_text(value['context'])} {_text(value['question'])}\nA:"
    answers = [value["answerA"], value["answerB"], value["answerC"]]
    return _question(context, answers, _gold(value["label"], "ABC", first=1))


def _parse_mmlu(value) -> Question:
    context = f"Question: {_text(value['question']).strip()}\n{_ANSWER}"
    question = _question(context, value["choices"], _gold(value["answer"], "ABCD"))
    return question._replace(group=str(value.get("subject", "")))


def _question(context: str, answers: Sequence[str], gold: int) -> Question:
    answers = [answer.strip() for answer in _texts(answers)]
    if len(answers) < 2:
        raise ValueError(f"{len(answers)} answers, fewer than two")
    if not 0 <= gold < len(answers):
        raise ValueError(f"the correct answer is number {gold + 1} of {len(answers)}")
    return Question(tuple(Item(context, f" {answer}") for answer in answers), gold)


def _gold(label, letters: str = "", first: int = 0) -> int:
    """Returns the index of the correct answer from one of `letters` or from a number counted from `first`."""
    if isinstance(label, str) and len(label) == 1 and label in letters:
        return letters.index(label)
    if isinstance(label, int | str) and re.fullmatch("-?[0-9]{1,9}", str(label)):
        return int(label) - first
    expected = f"a number or one of {letters}" if letters else "a number"
    raise ValueError(f"the label is {str(label)[:40]!r}, not {expected}")


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{json.dumps(value)[:40]} is not a string")
    return value


def _texts(values) -> list[str]:
    if not isinstance(values, list):
        raise TypeError(f"{json.dumps(values)[:40]} is not a list of strings")
    return [_text(value) for value in values]


_HIDDEN_TEST = ("val", "dev")  # for tasks whose test answers are not public

TASKS = {
    "blimp": Task(_parse_blimp, "acc", splits=(), pairs=True),
    "hellaswag": Task(_parse_hellaswag, "acc_norm", splits=_HIDDEN_TEST),
    "arc_easy": Task(_parse_arc, "acc_norm"),
    "arc_challenge": Task(_parse_arc, "acc_uncond", neutral=_ANSWER),
    "piqa": Task(_parse_piqa, "acc_norm", splits=_HIDDEN_TEST),
    "openbookqa": Task(_parse_openbookqa, "acc_uncond", neutral=""),
    "siqa": Task(_parse_siqa, "acc_norm", splits=_HIDDEN_TEST),
    "commonsenseqa": Task(_parse_arc, "acc_uncond", neutral=_ANSWER, splits=_HIDDEN_TEST),
    "mmlu": Task(_parse_mmlu, "acc_norm"),
}
