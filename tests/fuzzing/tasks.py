"""Fuzzing targets: task files in their published formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dualsm.evaluation.tasks import load_task
from tests.fuzzing.artifacts import Target, jsonl

_LETTERS = {"text": ["cold", "hot"], "label": ["A", "B"]}
TASK_FILES = {
    "blimp": {
        "blimp/a.jsonl": jsonl([{"sentence_good": "It is.", "sentence_bad": "It are.", "UID": "a"}] * 3)
    },
    "hellaswag": {"hellaswag.jsonl": jsonl([
        {"ctx_a": "A man", "ctx_b": "he", "activity_label": "A", "endings": ["is", "[x] was"], "label": "1"},
        {"ctx": "A man he", "activity_label": "Run", "endings": ["is.", "was."], "label": 0},
    ])},
    "arc_easy": {"arc_easy/test.jsonl": jsonl([
        {"question": {"stem": "Ice", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]},
         "answerKey": "A"},
        {"question": "Ice is", "choices": _LETTERS, "answerKey": "A"},
    ])},
    "piqa": {
        "piqa/valid.jsonl": jsonl([{"goal": "To sit", "sol1": "a chair", "sol2": "a nail"}] * 2),
        "piqa/valid-labels.lst": b"0\n1\n",
    },
    "siqa": {"siqa.jsonl": jsonl([
        {"context": "Al.", "question": "?", "answerA": "ice", "answerB": "y", "answerC": "x", "label": "1"}
    ])},
    "mmlu": {
        "mmlu/art_test.csv": b'"What, is ""it""?",a,b,c,d,C\r\nWho?,a,b,c,d,A\r\n',
        "mmlu/law_test.jsonl": jsonl([{"question": "Who?", "choices": ["a", "b"], "answer": 1}]),
    },
}  # fmt: skip


def targets() -> dict[str, Target]:
    """Returns a target for each task."""
    return {f"task {name}": Target(files, _reader(name)) for name, files in TASK_FILES.items()}


def _reader(name: str) -> Callable[[Path], None]:
    def use(folder: Path) -> None:
        for question in load_task(name, folder):
            assert 0 <= question.gold < len(question.items)
            assert all(item.completion.strip() and isinstance(item.context, str) for item in question.items)

    return use
