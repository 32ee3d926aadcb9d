"""Scores a trained run on zero-shot tasks and held-out text, in every mode it can be used in.

    python -m dualsm.evaluate --workdir=runs/tiny --tasks=blimp,arc_easy --task_data=eval \\
        --modes=causal,prefix,masked --output=scores.json
    python -m dualsm.evaluate --workdir=runs/tiny --tasks=valid
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from dualsm import cli
from dualsm.config import freeze
from dualsm.data.corpus import Corpus
from dualsm.errors import UserError
from dualsm.evaluation.run import TrainedRun, open_run
from dualsm.evaluation.scoring import MODES, Item, Scorer, Scoring
from dualsm.evaluation.tasks import TASKS, Judgement, Question, judge, load_task
from dualsm.evaluation.validation import Validation, valid_rows
from dualsm.progress import say, table

HELD_OUT = "valid"

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
_CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "step of the checkpoint; default: the newest")
_TASKS = flags.DEFINE_list("tasks", [HELD_OUT], f"{HELD_OUT} (held-out text), {', '.join(TASKS)}")
_TASK_DATA = flags.DEFINE_string("task_data", "", "folder with the tasks' files")
_MODES = flags.DEFINE_list("modes", ["causal", "prefix", "masked"], f"of {', '.join(MODES)}")
_MASKS = flags.DEFINE_list("masks", ["1", "4"], "masked: numbers of masks to average over")
_SAMPLES = flags.DEFINE_integer("samples", 128, "monte_carlo: draws an item", lower_bound=1)
_VALID_SAMPLES = flags.DEFINE_integer("valid_samples", 4, "held-out text: draws of a row", lower_bound=1)
_LIMIT = flags.DEFINE_integer("limit", 0, "items a task; 0: all", lower_bound=0)
_DATA = flags.DEFINE_string("data", "", "corpus of the held-out text; default: the run's own")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for the results; default: eval/ in the run's folder")
flags.mark_flags_as_required(["workdir"])


def evaluate_task(
    name: str, questions: Sequence[Question], scorer: Scorer, scoring: Scoring
) -> dict[str, float | int | dict]:
    """Results of one task in one mode, as they go into the JSON file."""
    start = time.perf_counter()
    items = [item for question in questions for item in question.items]
    label = f"{name}, {scoring.mode}"
    scores = scorer(items, scoring, label)
    borders = np.cumsum([len(question.items) for question in questions])[:-1]
    unconditional = None
    neutral = TASKS[name].neutral
    if neutral is not None:
        bare = [Item(neutral, item.completion) for item in items]
        bare_scores = scorer(bare, scoring, f"{label}, answers alone")
        unconditional = np.split(bare_scores.log_likelihood_N, borders)
    judgements = judge(questions, np.split(scores.log_likelihood_N, borders), unconditional)
    main = judgements[TASKS[name].main]
    return {
        "metric": TASKS[name].main,
        "score": main.accuracy,
        "stderr": main.stderr,
        "normalised": main.normalised,
        "n": len(questions),
        "seconds": time.perf_counter() - start,
        "contexts_cut": scores.cut,
        "metrics": {metric: judgement._asdict() for metric, judgement in judgements.items()},
        "settings": dataclasses.asdict(scoring),
    }


def evaluate_held_out(run: TrainedRun, data: str, samples: int) -> dict[str, dict]:
    """Loss of each objective on the held-out documents, as it goes into the JSON file."""
    corpus = Corpus(data)
    if corpus.manifest["tokenizer_sha256"] != run.tokenizer.sha256():
        raise UserError(f"--data={data} was made with another tokenizer than the run")
    start = time.perf_counter()
    rows = valid_rows(corpus.documents("valid"), run.config.row_tokens, 0, run.tokenizer.special.pad)
    names = ["causal", "prefix", "masked_diffusion"]
    validation = Validation(
        run.config, names, run.tokenizer.special, rows, run.tokenizer.token_bytes(), run.mesh, samples
    )
    scores = validation(run.params)
    return {
        name: {
            "nats_per_token": scores[f"valid/{name}/loss"],
            "perplexity": math.exp(scores[f"valid/{name}/loss"]),
            "bits_per_byte": scores[f"valid/{name}/bits_per_byte"],
            "samples": samples,
            "n": len(rows[0]),
            "seconds": time.perf_counter() - start,
        }
        for name in names
    }


def _check_flags() -> None:
    for mode in _MODES.value:
        if mode not in MODES:
            raise UserError(f"--modes: {mode!r} is none of {', '.join(MODES)}")
    for task in _TASKS.value:
        if task != HELD_OUT and task not in TASKS:
            raise UserError(f"--tasks: {task!r} is none of {HELD_OUT}, {', '.join(TASKS)}")
        if task != HELD_OUT and not _TASK_DATA.value:
            raise UserError(f"--tasks={task} needs --task_data=FOLDER with {task}/*.jsonl in it")
    if not all(n.isdigit() and int(n) > 0 for n in _MASKS.value):
        raise UserError(f"--masks={','.join(_MASKS.value)} must be positive numbers")


def main(_: Sequence[str]) -> None:
    cli.use_compilation_cache()
    _check_flags()
    names = [task for task in _TASKS.value if task != HELD_OUT]
    tasks = {name: load_task(name, _TASK_DATA.value, _LIMIT.value) for name in names}
    run = open_run(_WORKDIR.value, _CHECKPOINT.value)
    scorer = Scorer(freeze(run.config.model), run.params, run.tokenizer, run.mesh)

    results: dict = {"workdir": str(run.workdir), "checkpoint": run.step, "tasks": {}}
    for name, questions in tasks.items():
        results["tasks"][name] = {
            mode: evaluate_task(name, questions, scorer, _scoring(mode, run)) for mode in _MODES.value
        }
    if HELD_OUT in _TASKS.value:
        data = _DATA.value or run.config.data.path
        results["held_out"] = evaluate_held_out(run, data, _VALID_SAMPLES.value)

    _print(results)
    path = Path(_OUTPUT.value) if _OUTPUT.value else run.workdir / "eval" / f"step_{run.step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"results: {path}")


def _scoring(mode: str, run: TrainedRun) -> Scoring:
    masks = tuple(int(n) for n in _MASKS.value)
    return Scoring(mode, masks=masks, samples=_SAMPLES.value, longest=run.config.row_tokens)


def _print(results: dict) -> None:
    """Tasks down, modes across: accuracy with its standard error, in percent."""
    if results["tasks"]:
        rows = []
        for name, modes in results["tasks"].items():
            first = next(iter(modes.values()))
            cells = [_cell(Judgement(m["score"], m["stderr"], m["normalised"])) for m in modes.values()]
            rows.append([name, first["metric"], first["n"], *cells])
        means = [
            f"{np.mean([modes[mode]['normalised'] for modes in results['tasks'].values()]):.1f}"
            for mode in _MODES.value
        ]
        rows.append(["mean, 0 = guessing, 100 = perfect", "", "", *means])
        say(table(["task", "metric", "n", *_MODES.value], rows))
    if "held_out" in results:
        rows = [
            [
                name,
                f"{r['nats_per_token']:.4f}",
                f"{r['perplexity']:.2f}",
                f"{r['bits_per_byte']:.4f}",
                r["samples"],
            ]
            for name, r in results["held_out"].items()
        ]
        say(table(["held-out text", "nats a token", "perplexity", "bits a byte", "samples"], rows))


def _cell(judgement: Judgement) -> str:
    return f"{100 * judgement.accuracy:.1f} ± {100 * judgement.stderr:.1f}"


if __name__ == "__main__":
    cli.run(main)
