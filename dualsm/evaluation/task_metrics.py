"""Metrics of zero-shot tasks: accuracy, and the log-likelihood of the correct answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dualsm.evaluation.task_formats import Question

EQUAL_LENGTH = "(pairs of equal length)"  # a group of questions
_TOLERANCE = 1e-6  # relative or absolute; smaller differences are float32 rounding errors


class Metric(NamedTuple):
    """Accuracy of a task under one metric, in [0, 1].

    Attributes:
      accuracy: fraction of correctly answered questions; None without questions.
      stderr: standard error of the accuracy; None for fewer than two questions.
      normalised: 100 * (accuracy - guessing) / (1 - guessing); 0 for guessing, 100 for perfect answers.
      ties: number of questions whose correct answer shares the highest value with another answer.
    """

    accuracy: float | None
    stderr: float | None
    normalised: float | None
    ties: int


class Answer(NamedTuple):
    """Mean log-likelihood of the correct answers, in bits per byte of UTF-8, with standard errors.

    Resolves small differences between models better than accuracy, which depends only on the answer with the
    highest score.

    Attributes:
      bits_per_byte: negative log-likelihood of the correct answer; lower is better.
      margin: bits per byte of the best wrong answer minus those of the correct one; higher is better.
    """

    bits_per_byte: float | None
    bits_per_byte_stderr: float | None
    margin: float | None
    margin_stderr: float | None


def answer_metrics(questions: Sequence[Question], scores: Sequence[np.ndarray]) -> Answer:
    """Returns the metrics of the correct answers.

    Args:
      questions: questions of a task.
      scores: log-likelihood of each answer in nats, one array per question.
    """
    bits_N, margin_N = np.zeros(len(questions)), np.zeros(len(questions))
    for i, (question, score) in enumerate(zip(questions, scores, strict=True)):
        sizes = np.array([len(item.completion.strip().encode()) for item in question.items])
        bits = -score / (math.log(2) * sizes)
        bits_N[i] = bits[question.gold]
        margin_N[i] = np.delete(bits, question.gold).min() - bits_N[i]
    return Answer(*mean_and_stderr(bits_N), *mean_and_stderr(margin_N))


def slor(
    scores: Sequence[np.ndarray], unigram: Sequence[np.ndarray], tokens: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Returns the syntactic log-odds ratio of each answer: score minus unigram score, per token.

    Corrects for the number and the frequency of the tokens (Pauls and Klein, 2012; Lau et al., 2017).

    Args:
      scores: log-likelihood of each answer in nats, one array per question.
      unigram: the same for a unigram model.
      tokens: number of tokens of each answer.
    """
    return [(a - b) / n for a, b, n in zip(scores, unigram, tokens, strict=True)]


def equal_length_pairs(tokens: Sequence[np.ndarray], correct_N: np.ndarray) -> dict[str, dict]:
    """Returns the accuracy over the questions whose answers have the same number of tokens, as a group."""
    equal = np.array([len(set(counts.tolist())) == 1 for counts in tokens], bool)
    if not equal.any():
        return {}
    score, stderr = mean_and_stderr(correct_N[equal])
    return {EQUAL_LENGTH: {"score": score, "stderr": stderr, "n": int(equal.sum())}}


def compute_metrics(
    questions: Sequence[Question], values_by_metric: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, Metric]:
    """Computes the accuracy under every metric.

    Args:
      questions: questions of a task.
      values_by_metric: the values that each metric compares, see `answer_values`.
    """
    metrics = {}
    for name, values in values_by_metric.items():
        correct_N = correctness(questions, values)
        accuracy, stderr = mean_and_stderr(correct_N)
        normalised = None
        if questions:
            normalised = above(accuracy, guessing(questions))
        ties = int(((correct_N > 0) & (correct_N < 1)).sum())
        metrics[name] = Metric(accuracy, stderr, normalised, ties)
    return metrics


def guessing(questions: Sequence[Question]) -> float:
    """Returns the expected accuracy of guessing."""
    return float(np.mean([1 / len(question.items) for question in questions]))


def above(accuracy: float, floor: float) -> float:
    """Returns 100 * (accuracy - floor) / (1 - floor): 0 at the floor, 100 for perfect answers."""
    return 100 * (accuracy - floor) / (1 - floor) if floor < 1 else 0.0


def mean_and_stderr(values_N: np.ndarray) -> tuple[float | None, float | None]:
    """Returns the mean and its standard error; None where there are too few values."""
    size = len(values_N)
    mean = float(values_N.mean()) if size else None
    return mean, float(values_N.std(ddof=1) / math.sqrt(size)) if size > 1 else None


def answer_values(
    questions: Sequence[Question], scores: Sequence[np.ndarray], unconditional: Sequence[np.ndarray] | None
) -> dict[str, Sequence[np.ndarray]]:
    """Returns the values that each metric compares, one array per question.

    Args:
      questions: questions of a task.
      scores: log-likelihood of each answer in nats, one array per question.
      unconditional: the same after a neutral context, or None.

    Returns:
      The values of "acc", "acc_norm", and with `unconditional` "acc_uncond"; see `task_formats.Task`.
    """
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
        score, stderr = mean_and_stderr(np.array(group))
        results[name] = {"score": score, "stderr": stderr, "n": len(group)}
    return results
