"""How well a task's questions were answered, by every metric that applies."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np

from dualsm.evaluation.modes import Scoring
from dualsm.evaluation.scoring import Item, Scorer
from dualsm.evaluation.tasks import TASKS, Question

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


def evaluate_task(
    name: str, questions: Sequence[Question], scorer: Scorer, scoring: Scoring, limit: int = 0
) -> dict:
    """Returns the results of one task in one mode, as they are written into the JSON file.

    Questions with an answer that has too many tokens for a row are skipped.

    Args:
      name: of the task.
      questions: of the task.
      scorer: of the model.
      scoring: how to score.
      limit: the limit that the questions were loaded with, for the record.
    """
    start, task = time.perf_counter(), TASKS[name]
    label = f"{name}, {scoring.mode}"
    scores = scorer(_items(questions), scoring, label)
    answers, cut = (_by_question(questions, a) for a in (scores.log_likelihood_N, scores.cut_N))
    fits = [not np.isnan(values).any() for values in answers]
    kept, answers, cut = (list(compress(part, fits)) for part in (questions, answers, cut))
    bare = None
    if task.neutral is not None:
        alone = [Item(task.neutral, item.completion) for item in _items(kept)]
        bare = _by_question(kept, scorer(alone, scoring, f"{label}, answers alone").log_likelihood_N)
    judgements = judge(kept, answers, bare)
    main = judgements[task.main]
    right_N = right_answers(kept, adjusted(kept, answers, bare)[task.main])
    return {
        "metric": task.main,
        "score": main.accuracy,
        "stderr": main.stderr,
        "normalised": main.normalised,
        "n": len(kept),
        "skipped": len(questions) - len(kept),
        "ties": main.ties,
        "limit": limit,
        "seconds": time.perf_counter() - start,
        "contexts_cut": int(sum(answers_cut.any() for answers_cut in cut)),
        "metrics": {metric: judgement._asdict() for metric, judgement in judgements.items()},
        "groups": by_group(kept, right_N),
        "settings": scoring.settings(),
    }


def _items(questions: Sequence[Question]) -> list[Item]:
    return [item for question in questions for item in question.items]


def _by_question(questions: Sequence[Question], values: np.ndarray) -> list[np.ndarray]:
    """Splits one value per answer into one array per question."""
    return np.split(values, np.cumsum([len(question.items) for question in questions]))[:-1]


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
