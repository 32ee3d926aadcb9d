"""Metrics of zero-shot tasks: accuracy, standard error, normalized accuracy."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np

from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Item, Scorer
from dualsm.evaluation.task_formats import TASKS, Question

_TOLERANCE = 1e-6  # relative or absolute; smaller differences are float32 rounding errors


class Metric(NamedTuple):
    """Accuracy of a task under one metric, in [0, 1].

    Attributes:
      accuracy: fraction of correctly answered questions; None without questions.
      stderr: standard error of the accuracy; None for fewer than two questions.
      normalised: 100 * (accuracy - chance) / (1 - chance); 0 for guessing, 100 for perfect answers.
      ties: number of questions whose correct answer shares the highest value with another answer.
    """

    accuracy: float | None
    stderr: float | None
    normalised: float | None
    ties: int


def evaluate_task(
    name: str, questions: Sequence[Question], scorer: Scorer, scoring: ScoringParams, limit: int = 0
) -> dict:
    """Evaluates a task in one mode.

    Questions with an answer that does not fit into a sequence are skipped.

    Args:
      name: name of the task.
      questions: questions of the task.
      scorer: scores items with a model.
      scoring: scoring parameters.
      limit: the limit that the questions were loaded with; written to the results.

    Returns:
      The entry of this task and mode in the results file.
    """
    start, task = time.perf_counter(), TASKS[name]
    label = f"{name}, {scoring.mode}"
    scores = scorer(_items(questions), scoring, label)
    answers, truncated = (_by_question(questions, a) for a in (scores.log_likelihood_N, scores.truncated_N))
    fits = [not np.isnan(values).any() for values in answers]
    kept, answers, truncated = (list(compress(part, fits)) for part in (questions, answers, truncated))
    unconditional = None
    if task.neutral is not None:
        neutral = [Item(task.neutral, item.completion) for item in _items(kept)]
        unconditional_scores = scorer(neutral, scoring, f"{label}, unconditional")
        unconditional = _by_question(kept, unconditional_scores.log_likelihood_N)
    metrics = compute_metrics(kept, answers, unconditional)
    main = metrics[task.metric]
    correct_N = correctness(kept, answer_values(kept, answers, unconditional)[task.metric])
    return {
        "metric": task.metric,
        "score": main.accuracy,
        "stderr": main.stderr,
        "normalised": main.normalised,
        "n": len(kept),
        "skipped": len(questions) - len(kept),
        "ties": main.ties,
        "limit": limit,
        "seconds": time.perf_counter() - start,
        "contexts_truncated": int(sum(values.any() for values in truncated)),
        "metrics": {name: metric._asdict() for name, metric in metrics.items()},
        "groups": accuracy_by_group(kept, correct_N),
        "settings": scoring.settings(),
    }


def _items(questions: Sequence[Question]) -> list[Item]:
    return [item for question in questions for item in question.items]


def _by_question(questions: Sequence[Question], values: np.ndarray) -> list[np.ndarray]:
    """Splits an array with one value per answer into one array per question."""
    return np.split(values, np.cumsum([len(question.items) for question in questions]))[:-1]


def compute_metrics(
    questions: Sequence[Question], scores: Sequence[np.ndarray], unconditional: Sequence[np.ndarray] | None
) -> dict[str, Metric]:
    """Computes every metric that applies.

    Args:
      questions: questions of a task.
      scores: log-likelihood of each answer in nats, one array per question.
      unconditional: the same after a neutral context, or None.

    Returns:
      "acc", "acc_norm", and with `unconditional` "acc_uncond"; see `task_formats.Task`.
    """
    metrics = {}
    for name, values in answer_values(questions, scores, unconditional).items():
        correct_N = correctness(questions, values)
        accuracy, stderr = _mean_and_stderr(correct_N)
        normalised = None
        if questions:
            chance = float(np.mean([1 / len(question.items) for question in questions]))
            normalised = 100 * (accuracy - chance) / (1 - chance)
        ties = int(((correct_N > 0) & (correct_N < 1)).sum())
        metrics[name] = Metric(accuracy, stderr, normalised, ties)
    return metrics


def _mean_and_stderr(values_N: np.ndarray) -> tuple[float | None, float | None]:
    """Returns the mean and its standard error; None where there are too few values."""
    size = len(values_N)
    mean = float(values_N.mean()) if size else None
    return mean, float(values_N.std(ddof=1) / math.sqrt(size)) if size > 1 else None


def answer_values(
    questions: Sequence[Question], scores: Sequence[np.ndarray], unconditional: Sequence[np.ndarray] | None
) -> dict[str, Sequence[np.ndarray]]:
    """Returns the values that each metric compares, one array per question."""
    lengths = [np.array([len(item.completion.strip()) for item in q.items]) for q in questions]
    by_metric = {"acc": scores, "acc_norm": [s / n for s, n in zip(scores, lengths, strict=True)]}
    if unconditional is not None:
        by_metric["acc_uncond"] = [a - b for a, b in zip(scores, unconditional, strict=True)]
    return by_metric


def correctness(questions: Sequence[Question], values: Sequence[np.ndarray]) -> np.ndarray:
    """Returns 1 for each question whose correct answer has the highest value, else 0, as float [N].

    If k answers share the highest value and the correct one is among them, the question counts 1/k: the
    expected accuracy of choosing one of the k at random. The order of the answers therefore does not matter.
    """
    correct_N = np.zeros(len(questions))
    for i, (compared, question) in enumerate(zip(values, questions, strict=True)):
        best = np.isclose(compared, compared.max(), rtol=_TOLERANCE, atol=_TOLERANCE)
        correct_N[i] = best[question.gold] / best.sum()
    return correct_N


def accuracy_by_group(
    questions: Sequence[Question], correct_N: np.ndarray
) -> dict[str, dict[str, float | int | None]]:
    """Returns the accuracy within each paradigm or subject; empty if the task has only one."""
    groups: dict[str, list[float]] = {}
    for question, correct in zip(questions, correct_N, strict=True):
        groups.setdefault(question.group, []).append(correct)
    if len(groups) < 2:
        return {}
    results = {}
    for name, group in sorted(groups.items()):
        score, stderr = _mean_and_stderr(np.array(group))
        results[name] = {"score": score, "stderr": stderr, "n": len(group)}
    return results
