"""Evaluation of one task in one mode."""

from __future__ import annotations

import time
import types
from collections.abc import Mapping, Sequence
from itertools import compress

import numpy as np

from dualsm.evaluation.baselines import UNIGRAM, ScoreItems
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Item, Scorer
from dualsm.evaluation.task_formats import TASKS, Question, Task
from dualsm.evaluation.task_metrics import (
    above,
    accuracy_by_group,
    answer_metrics,
    answer_values,
    compute_metrics,
    correctness,
    equal_length_pairs,
    guessing,
    mean_and_stderr,
    slor,
)


def evaluate_task(
    name: str,
    questions: Sequence[Question],
    scorer: Scorer,
    scoring: ScoringParams,
    limit: int = 0,
    baselines: Mapping[str, ScoreItems] = types.MappingProxyType({}),
) -> dict:
    """Evaluates a task in one mode.

    Questions with an answer that does not fit into a sequence are skipped.

    Args:
      name: name of the task.
      questions: questions of the task.
      scorer: scores items with a model.
      scoring: scoring parameters.
      limit: the limit that the questions were loaded with; written to the results.
      baselines: baselines by name, see `baselines.open_baselines`.

    Returns:
      The entry of this task and mode in the results file.
    """
    start, task = time.perf_counter(), TASKS[name]
    label = f"{name}, {scoring.mode}"
    scores = scorer(_items(questions), scoring, label)
    arrays = (scores.log_likelihood_N, scores.truncated_N, scores.tokens_N)
    answers, truncated, tokens = (_by_question(questions, array_N) for array_N in arrays)
    fits = [not np.isnan(values).any() for values in answers]
    kept, answers, truncated, tokens = (
        list(compress(part, fits)) for part in (questions, answers, truncated, tokens)
    )
    unconditional = _unconditional(task, kept, scorer, scoring, label)
    values = answer_values(kept, answers, unconditional)
    known = {
        baseline: _baseline_values(task, kept, score, scoring, f"{label}, {baseline}")
        for baseline, score in baselines.items()
    }
    entries = {baseline: _baseline_entry(task, kept, values) for baseline, values in known.items()}
    if task.pairs and UNIGRAM in known:
        values["slor"] = slor(answers, known[UNIGRAM]["acc"], tokens)
    metrics = compute_metrics(kept, values)
    main = metrics[task.metric]
    above_baselines = None
    if entries and kept:
        floor = max(guessing(kept), *(entry["score"] for entry in entries.values()))
        above_baselines = above(main.accuracy, floor)
    correct_N = correctness(kept, values[task.metric])
    groups = accuracy_by_group(kept, correct_N)
    if task.pairs:
        groups |= equal_length_pairs(tokens, correct_N)
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
        "answer": answer_metrics(kept, answers)._asdict(),
        "baselines": entries,
        "above_baselines": above_baselines,
        "groups": groups,
        "settings": scoring.settings(),
    }


def _unconditional(
    task: Task, questions: Sequence[Question], score: ScoreItems, scoring: ScoringParams, label: str
) -> list[np.ndarray] | None:
    """Returns the scores of the answers after the neutral context, or None if the task has none."""
    if task.neutral is None:
        return None
    neutral = [Item(task.neutral, item.completion) for item in _items(questions)]
    scores = score(neutral, scoring, f"{label}, unconditional")
    return _by_question(questions, scores.log_likelihood_N)


def _baseline_values(
    task: Task, questions: Sequence[Question], score: ScoreItems, scoring: ScoringParams, label: str
) -> dict[str, Sequence[np.ndarray]]:
    """Returns the values of a baseline by metric, see `answer_values`."""
    answers = _by_question(questions, score(_items(questions), scoring, label).log_likelihood_N)
    return answer_values(questions, answers, _unconditional(task, questions, score, scoring, label))


def _baseline_entry(
    task: Task, questions: Sequence[Question], values: Mapping[str, Sequence[np.ndarray]]
) -> dict:
    """Returns the main metric of a baseline and its bits per byte, for the results file."""
    accuracy, stderr = mean_and_stderr(correctness(questions, values[task.metric]))
    bits = answer_metrics(questions, values["acc"]).bits_per_byte
    return {"score": accuracy, "stderr": stderr, "bits_per_byte": bits}


def _items(questions: Sequence[Question]) -> list[Item]:
    return [item for question in questions for item in question.items]


def _by_question(questions: Sequence[Question], values: np.ndarray) -> list[np.ndarray]:
    """Splits an array with one value per answer into one array per question."""
    return np.split(values, np.cumsum([len(question.items) for question in questions]))[:-1]
