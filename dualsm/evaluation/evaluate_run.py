"""Evaluation of a trained run on zero-shot tasks and held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import jax

from dualsm.config import freeze
from dualsm.data.corpus import Corpus
from dualsm.devices.sharding import batch_devices
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Scorer, scoring_batch_size
from dualsm.evaluation.spec import HELD_OUT, EvalSpec
from dualsm.evaluation.task_formats import Question
from dualsm.evaluation.task_metrics import evaluate_task
from dualsm.evaluation.tasks import load_task
from dualsm.generation.generate import check_mode
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun
from dualsm.training.validation import Validation, valid_rows


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
      An iterator over the results so far, one dict that grows: after each task and mode, and after each
      objective on held-out text. `docs/evaluation.md` describes its keys.

    Raises:
      UserError: if the run cannot be used in one of the modes, or its held-out text cannot be read.
    """
    spec.check()
    for mode in spec.modes if tasks else ():
        check_mode(run, mode)
    corpus = open_held_out(run, spec.data) if HELD_OUT in spec.tasks else None
    return _evaluate(run, spec, tasks, corpus)


def _evaluate(
    run: TrainedRun, spec: EvalSpec, tasks: Mapping[str, Sequence[Question]], corpus: Corpus | None
) -> Iterator[dict]:
    scorer = Scorer(freeze(run.config.model), run.params, run.tokenizer, run.mesh)
    results: dict = {"workdir": str(run.workdir), "checkpoint": run.step, "tasks": {}}
    if run.parameters != "last":
        results["parameters"] = run.parameters
    for name, questions in tasks.items():
        results["tasks"][name] = {}
        for mode in spec.modes:
            scoring = ScoringParams(mode, tuple(spec.masks), spec.samples, run.config.seq_len)
            results["tasks"][name][mode] = evaluate_task(name, questions, scorer, scoring, spec.limit)
            yield results
    if corpus:
        results["held_out"] = {}
        for name, result in evaluate_held_out(run, corpus, spec.objectives(), spec.valid_samples):
            results["held_out"][name] = result
            yield results


def open_held_out(run: TrainedRun, path: str = "") -> Corpus:
    """Opens and verifies the corpus whose held-out documents are scored.

    Args:
      run: the run.
      path: path of the corpus; empty for the corpus that the run was trained on.

    Raises:
      UserError: if the corpus is damaged, has no held-out documents, or was made with another tokenizer.
    """
    path = path or run.config.data.path
    corpus = Corpus(path)
    if corpus.manifest["tokenizer_sha256"] != run.tokenizer.sha256():
        raise UserError(f"--data={path} was prepared with another tokenizer than the run's; prepare it again")
    corpus.verify("valid")
    corpus.documents("valid")  # reads the document lengths, and fails if there are none
    return corpus


def evaluate_held_out(
    run: TrainedRun, corpus: Corpus, objectives: Sequence[str], samples: int
) -> Iterator[tuple[str, dict]]:
    """Scores held-out text under several objectives.

    Args:
      run: the run.
      corpus: from `open_held_out`.
      objectives: names of the objectives.
      samples: draws of the corruption per packed sequence.

    Yields:
      The name of each objective and its entry in the results file.

    Raises:
      UserError: if a loss is not finite or too large for its perplexity to be represented.
    """
    seq_len, special = run.config.seq_len, run.tokenizer.special
    rows = valid_rows(corpus.documents("valid"), seq_len, 0, special, run.tokenizer.token_bytes())
    num_devices = batch_devices(run.mesh)
    needed = -(-len(rows[0]) * samples // num_devices) * num_devices  # a multiple of the number of devices
    validation = Validation(
        run.config, objectives, special, rows, run.mesh, samples,
        batch_size=min(scoring_batch_size(run.mesh, seq_len), needed),
    )  # fmt: skip
    for name in objectives:
        start = time.perf_counter()
        with jax.set_mesh(run.mesh):
            scores = validation(run.params, [name])
        loss = scores[f"valid/{name}/loss"]
        if not loss < 700:  # exp(loss) overflows above
            raise UserError(
                f"the held-out loss of {name} is {loss} nats per token, because training diverged; "
                "use an earlier checkpoint"
            )
        result = {
            "nats_per_token": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": scores[f"valid/{name}/bits_per_byte"],
            "bytes_of": "documents" if rows.exact else "tokens",
            "n": len(rows[0]),
            "samples": samples,
            "seconds": time.perf_counter() - start,
            "settings": {"data": str(corpus.folder), "seq_len": seq_len, "samples": samples},
        }
        yield name, result
