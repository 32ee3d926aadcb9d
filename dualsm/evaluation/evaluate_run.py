"""Evaluation of a trained run on zero-shot tasks and held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dualsm.config import freeze
from dualsm.data.corpus import CorpusNotFound
from dualsm.evaluation.acceptance import evaluate_acceptance
from dualsm.evaluation.baselines import ScoreItems, open_baselines
from dualsm.evaluation.evaluate_task import evaluate_task
from dualsm.evaluation.held_out import evaluate_held_out, open_held_out
from dualsm.evaluation.infilling import evaluate_infilling
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Scorer
from dualsm.evaluation.spec import HELD_OUT, EvalSpec
from dualsm.evaluation.task_formats import Question
from dualsm.evaluation.tasks import load_task
from dualsm.generation.generate import check_mode, is_shifted
from dualsm.objectives.sources import trained_sources
from dualsm.rundir.trained_run import TrainedRun
from dualsm.training.run_corpora import RunCorpus


def load_tasks(spec: EvalSpec) -> dict[str, list[Question]]:
    """Loads the questions of each task in a spec; see `tasks.load_task`."""
    return {name: load_task(name, spec.task_data, spec.limit) for name in spec.question_tasks()}


def evaluate_run(run: TrainedRun, spec: EvalSpec, tasks: Mapping[str, Sequence[Question]]) -> Iterator[dict]:
    """Evaluates a run; all inputs are checked before the first forward pass.

    Args:
      run: the run.
      spec: the evaluation spec.
      tasks: questions of each task, from `load_tasks`.

    Returns:
      An iterator over the results so far, one dict that grows: after each task and mode, after the acceptance
      of drafts, after the infilling of words, and after each objective on held-out text.
      `docs/evaluation.md` describes its keys.

    Raises:
      UserError: if the run cannot be used in one of the modes, or its held-out text cannot be read.
    """
    spec.check()
    for mode in spec.modes if tasks else ():
        check_mode(run, mode)
    corpora = open_corpora_to_score(run, spec.data) if HELD_OUT in spec.tasks else []
    baselines = open_baselines(spec.baselines, run) if tasks else {}
    return _evaluate(run, spec, tasks, corpora, baselines)


def open_corpora_to_score(run: TrainedRun, data: str) -> list[RunCorpus]:
    """Opens the corpora of `--data`; see `open_held_out`. The error of a missing corpus names the flag."""
    try:
        return open_held_out(run, data)
    except CorpusNotFound as error:
        if data:
            raise
        names = [source.name for source in trained_sources(run.config)]
        moved = ",".join(f"{name}=PATH" if name else "PATH" for name in names)
        raise CorpusNotFound(f"{error}; if a corpus was moved, set --data={moved}") from error


def _evaluate(
    run: TrainedRun,
    spec: EvalSpec,
    tasks: Mapping[str, Sequence[Question]],
    corpora: list[RunCorpus],
    baselines: Mapping[str, ScoreItems],
) -> Iterator[dict]:
    scorer = Scorer(freeze(run.config.model), run.params, run.tokenizer, run.mesh)
    results: dict = {"workdir": str(run.workdir), "checkpoint": run.step, "tasks": {}}
    if run.parameters != "last":
        results["parameters"] = run.parameters
    for name, questions in tasks.items():
        results["tasks"][name] = {}
        for mode in spec.modes:
            scoring = ScoringParams(mode, tuple(spec.masks), spec.samples, run.config.seq_len)
            results["tasks"][name][mode] = evaluate_task(
                name, questions, scorer, scoring, spec.limit, baselines
            )
            yield results
    if corpora and is_shifted(run):  # before the losses, by which a sweep knows the end
        documents = [corpus.documents("valid") for _, corpus in corpora]
        for name, evaluate, size in (
            ("acceptance", evaluate_acceptance, spec.draft),
            ("infilling", evaluate_infilling, spec.infill_words if spec.fills_in() else 0),
        ):
            if size:
                results[name] = evaluate(run, documents, size)
                results[name]["settings"]["data"] = [str(corpus.folder) for _, corpus in corpora]
                yield results
    if corpora:
        results["held_out"] = {}
        for name, result in evaluate_held_out(
            run, corpora, spec.objectives(), spec.valid_samples, spec.by_document
        ):
            results["held_out"][name] = result
            yield results
