"""Evaluation of a trained run on zero-shot tasks and held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import jax

from dualsm.config import freeze
from dualsm.data.corpus import Corpus
from dualsm.devices.sharding import batch_devices
from dualsm.evaluation.acceptance import evaluate_acceptance
from dualsm.evaluation.baselines import ScoreItems, open_baselines
from dualsm.evaluation.evaluate_task import evaluate_task
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Scorer, scoring_batch_size
from dualsm.evaluation.spec import HELD_OUT, EvalSpec
from dualsm.evaluation.task_formats import Question
from dualsm.evaluation.tasks import load_task
from dualsm.generation.generate import check_mode, is_shifted
from dualsm.objectives.sources import Source
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun
from dualsm.training.run_corpora import RunCorpus, check_tokenizer, open_corpora
from dualsm.training.valid_rows import rows_by_source
from dualsm.training.validation import SourceValidation, Validation


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
      An iterator over the results so far, one dict that grows: after each task and mode, after each objective
      on held-out text, and after the acceptance of drafts. `docs/evaluation.md` describes its keys.

    Raises:
      UserError: if the run cannot be used in one of the modes, or its held-out text cannot be read.
    """
    spec.check()
    for mode in spec.modes if tasks else ():
        check_mode(run, mode)
    corpora = open_held_out(run, spec.data) if HELD_OUT in spec.tasks else []
    baselines = open_baselines(spec.baselines, run) if tasks else {}
    return _evaluate(run, spec, tasks, corpora, baselines)


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
    if corpora and spec.draft and is_shifted(run):  # before the losses, by which a sweep knows the end
        documents = [corpus.documents("valid") for _, corpus in corpora]
        results["acceptance"] = evaluate_acceptance(run, documents, spec.draft)
        results["acceptance"]["settings"]["data"] = [str(corpus.folder) for _, corpus in corpora]
        yield results
    if corpora:
        results["held_out"] = {}
        for name, result in evaluate_held_out(run, corpora, spec.objectives(), spec.valid_samples):
            results["held_out"][name] = result
            yield results


def open_held_out(run: TrainedRun, path: str = "") -> list[RunCorpus]:
    """Opens and verifies the corpora whose held-out documents are scored.

    Args:
      run: the run.
      path: path of a corpus; empty for the corpora that the run was trained on.

    Raises:
      UserError: if a corpus is damaged, has no held-out documents, or was made with another tokenizer.
    """
    corpora = [RunCorpus(Source("", path, 1), Corpus(path))] if path else open_corpora(run.config)
    check_tokenizer(corpora, run.tokenizer)
    for _, corpus in corpora:
        corpus.verify("valid")
        corpus.documents("valid")  # reads the document lengths, and fails if there are none
    return corpora


def evaluate_held_out(
    run: TrainedRun, corpora: Sequence[RunCorpus], objectives: Sequence[str], samples: int
) -> Iterator[tuple[str, dict]]:
    """Scores held-out text under several objectives.

    Args:
      run: the run.
      corpora: from `open_held_out`.
      objectives: names of the objectives.
      samples: draws of the corruption per packed sequence.

    Yields:
      The name of each objective and its entry in the results file, over all corpora. If the run has sources,
      "<source>/<objective>" and the entry of each source follow.

    Raises:
      UserError: if a loss is not finite or too large for its perplexity to be represented.
    """
    seq_len, special = run.config.seq_len, run.tokenizer.special
    rows = rows_by_source(corpora, seq_len, 0)
    validation = SourceValidation(
        {
            name: Validation(
                run.config, objectives, special, part, run.mesh, samples,
                batch_size=_batch_size(run, len(part[0]) * samples),
            )
            for name, part in rows.items()
        }
    )  # fmt: skip
    folders = {source.name: str(corpus.folder) for source, corpus in corpora}
    for name in objectives:
        start = time.perf_counter()
        with jax.set_mesh(run.mesh):
            scores = validation(run.params, [name])
        seconds = time.perf_counter() - start
        parts = {name: list(rows)} | {f"{source}/{name}": [source] for source in rows if source}
        for key, sources in parts.items():
            loss = scores[f"valid/{key}/loss"]
            if not loss < 700:  # exp(loss) overflows above
                raise UserError(
                    f"the held-out loss of {key} is {loss} nats per token, because training diverged; "
                    "use an earlier checkpoint"
                )
            result = {
                "nats_per_token": loss,
                "perplexity": math.exp(loss),
                "bits_per_byte": scores[f"valid/{key}/bits_per_byte"],
                "bytes_of": "documents" if all(rows[source].exact for source in sources) else "tokens",
                "n": sum(len(rows[source][0]) for source in sources),
                "samples": samples,
                "seconds": seconds,
                "settings": {
                    "data": ", ".join(folders[source] for source in sources),
                    "seq_len": seq_len,
                    "samples": samples,
                },
            }
            yield key, result


def _batch_size(run: TrainedRun, rows: int) -> int:
    """Returns the batch size for scoring a number of rows, a multiple of the number of devices."""
    num_devices = batch_devices(run.mesh)
    return min(scoring_batch_size(run.mesh, run.config.seq_len), -(-rows // num_devices) * num_devices)
