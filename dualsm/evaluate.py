"""Scores a trained run on zero-shot tasks and held-out text, in every mode it can be used in.

    python -m dualsm.evaluate --workdir=runs/tiny --tasks=blimp,arc_easy --task_data=eval \\
        --modes=causal,prefix,masked --output=scores.json
    python -m dualsm.evaluate --workdir=runs/tiny --tasks=valid
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from dualsm.config import freeze
from dualsm.data.corpus import Corpus
from dualsm.devices.sharding import batch_devices
from dualsm.evaluation import harness_results
from dualsm.evaluation.judging import evaluate_task
from dualsm.evaluation.modes import MODES, Scoring
from dualsm.evaluation.scoring import Scorer, sequences_at_once
from dualsm.evaluation.tasks import TASKS, Question, describe_files, load_task, task_files
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.output import check_output, make_folder, write_output
from dualsm.process.progress import say, table, warn
from dualsm.rundir.results import HELD_OUT, OBJECTIVES, EvalSpec, merge, read_results, results_file
from dualsm.rundir.trained_run import TrainedRun, open_run
from dualsm.training.validation import BYTES_OF_TOKENS, Validation, valid_rows

_WORKDIR = cli.DEFINE_path("workdir", None, "folder of the run")
_CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "step of the checkpoint; default: the newest")
_TASKS = flags.DEFINE_list("tasks", [HELD_OUT], f"{HELD_OUT} (held-out text), {', '.join(TASKS)}")
_TASK_DATA = cli.DEFINE_path("task_data", "", "folder with the tasks' files")
_MODES = flags.DEFINE_list("modes", ["causal", "prefix", "masked"], f"of {', '.join(MODES)}")
_MASKS = flags.DEFINE_list("masks", ["1", "4"], "masked: numbers of masks to average over")
_SAMPLES = flags.DEFINE_integer("samples", 128, "monte_carlo: draws an item", lower_bound=1)
_VALID_SAMPLES = flags.DEFINE_integer("valid_samples", 4, "held-out text: draws of a row", lower_bound=1)
_LIMIT = flags.DEFINE_integer("limit", 0, "items a task; 0: all", lower_bound=0)
_DATA = cli.DEFINE_path("data", "", "corpus of the held-out text; default: the run's own")
_OUTPUT = cli.DEFINE_path(
    "output",
    "",
    "JSON file for the results of this call; default: eval/step_N.json in the run's folder, which keeps what "
    "was measured of other tasks, modes and objectives",
)
_HARNESS_OUTPUT = cli.DEFINE_path(
    "harness_output", "", "folder for the results as lm-evaluation-harness writes them, a file for each mode"
)
flags.mark_flags_as_required(["workdir"])


def open_held_out(run: TrainedRun, data: str) -> Corpus:
    """Opens and verifies the corpus whose held-out documents are scored.

    Raises:
      UserError: when it is damaged, has no held-out documents, or was made with another tokenizer.
    """
    corpus = Corpus(data)
    if corpus.manifest["tokenizer_sha256"] != run.tokenizer.sha256():
        raise UserError(f"--data={data} was made with another tokenizer than the run")
    corpus.verify("valid")
    corpus.documents("valid")  # reads their lengths
    return corpus


def evaluate_held_out(
    run: TrainedRun, corpus: Corpus, objectives: Sequence[str], samples: int
) -> Iterator[tuple[str, dict]]:
    """Yields each objective and its loss on the held-out documents, as it is written into the JSON file."""
    tokens, special = run.config.seq_len, run.tokenizer.special
    rows = valid_rows(corpus.documents("valid"), tokens, 0, special, run.tokenizer.token_bytes())
    devices = batch_devices(run.mesh)
    enough = -(-len(rows[0]) * samples // devices) * devices
    validation = Validation(
        run.config, objectives, special, rows, run.mesh, samples,
        at_once=min(sequences_at_once(run.mesh, tokens), enough),
    )  # fmt: skip
    for name in objectives:
        start = time.perf_counter()
        with jax.set_mesh(run.mesh):
            scores = validation(run.params, [name])
        loss = scores[f"valid/{name}/loss"]
        if not loss < 700:  # beyond it the perplexity is no number
            raise UserError(f"the held-out loss of {name} is {loss} nats a token; the training diverged")
        result = {
            "nats_per_token": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": scores[f"valid/{name}/bits_per_byte"],
            "bytes_of": "documents" if rows.exact else "tokens",
            "n": len(rows[0]),
            "samples": samples,
            "seconds": time.perf_counter() - start,
            "settings": {"data": str(corpus.folder), "seq_len": tokens, "samples": samples},
        }
        yield name, result


def _asked() -> EvalSpec:
    """What the flags ask for. Raises `UserError`, naming the flag, for what cannot be done."""
    tasks, modes = (list(dict.fromkeys(flag.value)) for flag in (_TASKS, _MODES))
    asked = EvalSpec(tasks, modes, _TASK_DATA.value, _LIMIT.value)
    asked.check()
    if not _MASKS.value or not all(n.isdigit() and int(n) > 0 for n in _MASKS.value):
        raise UserError(f"--masks={','.join(_MASKS.value)} must be positive numbers")
    return asked


def main(_: Sequence[str]) -> None:
    started = time.time()
    cli.set_up_jax()
    asked = _asked()
    names = [task for task in asked.tasks if task != HELD_OUT]
    tasks = {name: load_task(name, asked.task_data, asked.limit) for name in names}
    for name, questions in tasks.items():
        files = describe_files(task_files(name, asked.task_data))
        say(f"{name}: {len(questions):,} questions from {files}")
    sizes = tasks
    if _HARNESS_OUTPUT.value and asked.limit:
        sizes = {name: load_task(name, asked.task_data) for name in names}
    run = open_run(_WORKDIR.value, _CHECKPOINT.value)
    for mode in asked.modes if names else ():
        run.check_mode(mode)
    held_out = None
    if HELD_OUT in asked.tasks:
        held_out = open_held_out(run, _DATA.value or run.config.data.path)
    kept = results_file(run.workdir, run.step)
    path = Path(_OUTPUT.value) if _OUTPUT.value else kept
    check_output(path, "--output")
    if not _OUTPUT.value:
        read_results(kept)  # a damaged file ends the command before the work
    if _HARNESS_OUTPUT.value:
        make_folder(Path(_HARNESS_OUTPUT.value), "--harness_output")

    for results in _evaluate(run, asked, tasks, held_out):
        _write(path, results if _OUTPUT.value else merge(read_results(kept), results), "--output")
    written = [f"results: {path}"]
    if _HARNESS_OUTPUT.value:
        for path in _write_for_harness(results, asked, run, sizes, started):
            written.append(f"for lm-evaluation-harness's readers: {path}")
    _print(results, asked.modes)
    say("\n" + "\n".join(written))


def _evaluate(
    run: TrainedRun, asked: EvalSpec, tasks: dict[str, Sequence[Question]], held_out: Corpus | None
) -> Iterator[dict]:
    """Yields the results so far after each task and mode, and after each objective on held-out text."""
    scorer = Scorer(freeze(run.config.model), run.params, run.tokenizer, run.mesh)
    results: dict = {"workdir": str(run.workdir), "checkpoint": run.step, "tasks": {}}
    for name, questions in tasks.items():
        results["tasks"][name] = {}
        for mode in asked.modes:
            result = evaluate_task(name, questions, scorer, _scoring(mode, run), asked.limit)
            results["tasks"][name][mode] = result
            yield results
    if held_out:
        results["held_out"] = {}
        for name, result in evaluate_held_out(run, held_out, asked.objectives(), _VALID_SAMPLES.value):
            results["held_out"][name] = result
            yield results


def _write_for_harness(
    results: dict, asked: EvalSpec, run: TrainedRun, everything: dict[str, Sequence[Question]], started: float
) -> Iterator[Path]:
    """Writes the results in the layout of lm-evaluation-harness, one file per mode, and yields the paths."""
    limit, held_out = asked.limit or None, results.get("held_out", {})
    config = {
        "model_num_parameters": sum(p.size for p in jax.tree.leaves(run.params)),
        "model_dtype": run.config.model.dtype,
        "limit": limit,
    }
    for mode in asked.modes:
        converted = harness_results.layout(
            results, mode, everything, held_out.get(OBJECTIVES[mode]), config, started, time.time() - started
        )
        path = harness_results.results_path(Path(_HARNESS_OUTPUT.value), converted)
        make_folder(path.parent, "--harness_output")
        _write(path, converted, "--harness_output")
        yield path


def _write(path: Path, results: dict, flag: str) -> None:
    write_output(path, json.dumps(results, indent=1, allow_nan=False) + "\n", flag)


def _scoring(mode: str, run: TrainedRun) -> Scoring:
    masks = tuple(int(n) for n in _MASKS.value)
    return Scoring(mode, masks=masks, samples=_SAMPLES.value, longest=run.config.seq_len)


def _print(results: dict, modes: Sequence[str]) -> None:
    tasks, held_out = results["tasks"], results.get("held_out")
    say(f"{results['workdir']}, step {results['checkpoint']}")
    if tasks:
        say("\naccuracy in percent, with its standard error\n" + _task_table(tasks, modes))
        for name, by_mode in tasks.items():
            cut, skipped = (max(r[key] for r in by_mode.values()) for key in ("contexts_cut", "skipped"))
            longest = max(result["settings"]["longest"] for result in by_mode.values())
            if cut:
                warn(
                    f"{name}: {cut} contexts lost their beginning; with the answer and `<s>` they have more "
                    f"than the {longest} tokens of the model's rows"
                )
            if skipped:
                warn(
                    f"{name}: {skipped} questions were skipped; an answer has no tokens, or with `<s>` more "
                    f"than the {longest} tokens of the model's rows"
                )
    if held_out:
        rows = [
            [
                name,
                f"{r['nats_per_token']:.4f}",
                f"{r['perplexity']:.2f}",
                f"{r['bits_per_byte']:.4f}",
                r["samples"],
            ]
            for name, r in held_out.items()
        ]
        say("\n" + table(["held-out text", "nats a token", "perplexity", "bits a byte", "draws"], rows))
        if any(r["bytes_of"] == "tokens" for r in held_out.values()):
            warn(BYTES_OF_TOKENS)


def _task_table(tasks: dict, modes: Sequence[str]) -> str:
    """Tasks down, modes across; the last line is comparable between models."""
    rows = []
    for name, by_mode in tasks.items():
        first = by_mode[modes[0]]
        rows.append([name, first["metric"], first["n"], *(_cell(by_mode[mode]) for mode in modes)])
    means = [[by_mode[mode]["normalised"] for by_mode in tasks.values()] for mode in modes]
    cells = ["" if None in values else f"{np.mean(values):.1f}" for values in means]
    rows.append(["mean (0 guessing, 100 perfect)", "", "", *cells])
    return table(["task", "metric", "n", *modes], rows)


def _cell(result: dict) -> str:
    if result["score"] is None:
        return ""
    accuracy, stderr = 100 * result["score"], result["stderr"]
    return f"{accuracy:.1f}" if stderr is None else f"{accuracy:.1f} ± {100 * stderr:.1f}"


if __name__ == "__main__":
    cli.run(main)
