"""How well a task's questions were answered, by every metric that applies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dualsm.evaluation.tasks import Question

_NOISE = 1e-6  # differences below it, relative or absolute, are rounding errors of float32


class Judgement(NamedTuple):
    """Accuracy of a task under one metric, in [0, 1].

    Attributes:
      accuracy: share of questions answered rightly; None without questions.
      stderr: its standard error; None for fewer than two questions.
      normalised: 100 * (accuracy - chance) / (1 - chance); 0 is guessing, 100 perfect.
      ties: questions whose right answer shares the highest value with another answer.
    """

    accuracy: float | None
    stderr: float | None
    normalised: float | None
    ties: int


def judge(
    questions: Sequence[Question], scores: Sequence[np.ndarray], unconditional: Sequence[np.ndarray] | None
) -> dict[str, Judgement]:
    """Judges the answers by every metric that applies.

    Args:
      questions: of a task.
      scores: log-likelihood of each answer, one array a question.
      unconditional: the same after a neutral context, or None.

    Returns:
      "acc", "acc_norm", and with `unconditional` "acc_uncond"; see `dualsm.evaluation.tasks.Task`.
    """
    judgements = {}
    for metric, values in adjusted(questions, scores, unconditional).items():
        right_N = right_answers(questions, values)
        accuracy, stderr = _mean(right_N)
        normalised = None
        if questions:
            chance = float(np.mean([1 / len(question.items) for question in questions]))
            normalised = 100 * (accuracy - chance) / (1 - chance)
        ties = int(((right_N > 0) & (right_N < 1)).sum())
        judgements[metric] = Judgement(accuracy, stderr, normalised, ties)
    return judgements


def _mean(right_N: np.ndarray) -> tuple[float | None, float | None]:
    """Returns the mean and its standard error; None for what too few values leave undefined."""
    size = len(right_N)
    mean = float(right_N.mean()) if size else None
    return mean, float(right_N.std(ddof=1) / math.sqrt(size)) if size > 1 else None


def adjusted(
    questions: Sequence[Question], scores: Sequence[np.ndarray], unconditional: Sequence[np.ndarray] | None
) -> dict[str, Sequence[np.ndarray]]:
    """What each metric compares: the answers' scores, one array a question."""
    sizes = [np.array([len(item.completion.strip()) for item in q.items]) for q in questions]
    by_metric = {"acc": scores, "acc_norm": [s / size for s, size in zip(scores, sizes, strict=True)]}
    if unconditional is not None:
        by_metric["acc_uncond"] = [a - b for a, b in zip(scores, unconditional, strict=True)]
    return by_metric


def right_answers(questions: Sequence[Question], values: Sequence[np.ndarray]) -> np.ndarray:
    """Returns 1 for each question whose right answer has the highest value, else 0, as float [N].

    If k answers share the highest value, the right one among them counts 1/k: the expected accuracy of a
    choice by chance, so that the order of the answers does not matter.
    """
    right_N = np.zeros(len(questions))
    for i, (compared, question) in enumerate(zip(values, questions, strict=True)):
        best = np.isclose(compared, compared.max(), rtol=_NOISE, atol=_NOISE)
        right_N[i] = best[question.gold] / best.sum()
    return right_N


def by_group(questions: Sequence[Question], right_N: np.ndarray) -> dict[str, dict[str, float | int | None]]:
    """Accuracy within each paradigm or subject; empty when the task has no more than one."""
    groups: dict[str, list[float]] = {}
    for question, right in zip(questions, right_N, strict=True):
        groups.setdefault(question.group, []).append(right)
    if len(groups) < 2:
        return {}
    results = {}
    for name, group in sorted(groups.items()):
        score, stderr = _mean(np.array(group))
        results[name] = {"score": score, "stderr": stderr, "n": len(group)}
    return results
