"""Evaluates a trained run on zero-shot tasks and held-out text, in every mode.

    python -m dualsm.evaluate --workdir=runs/tiny --tasks=blimp,arc_easy --task_data=eval \\
        --modes=causal,prefix,masked --output=scores.json
    python -m dualsm.evaluate --workdir=runs/tiny --tasks=valid
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from absl import flags

from dualsm.evaluation.baselines import BASELINES, default_baselines
from dualsm.evaluation.evaluate_run import evaluate_run, load_tasks
from dualsm.evaluation.modes import MODES
from dualsm.evaluation.results_table import results_table, results_warnings
from dualsm.evaluation.spec import HELD_OUT, EvalSpec
from dualsm.evaluation.task_formats import TASKS
from dualsm.evaluation.tasks import describe_files, task_files
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.output import check_output, write_output
from dualsm.process.paths import user_path
from dualsm.process.progress import say, warn
from dualsm.rundir.results import merge, read_results, results_file
from dualsm.rundir.trained_run import PARAMETERS, open_run

_WORKDIR = cli.DEFINE_path("workdir", None, "run directory")
_CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "step of the checkpoint; default: the newest")
_PARAMETERS = flags.DEFINE_enum(
    "parameters", "last", list(PARAMETERS), "last: the weights; ema: their moving average (config.ema)"
)
_TASKS = flags.DEFINE_list("tasks", [HELD_OUT], f"tasks: {HELD_OUT} (held-out text), {', '.join(TASKS)}")
_TASK_DATA = cli.DEFINE_path("task_data", "", "folder with the tasks' files")
_MODES = flags.DEFINE_list("modes", ["causal", "prefix", "masked"], f"modes: {', '.join(MODES)}")
_MASKS = flags.DEFINE_list("masks", ["1", "4"], "masked: numbers of masks to average over")
_SAMPLES = flags.DEFINE_integer("samples", 128, "monte_carlo: draws per answer", lower_bound=1)
_VALID_SAMPLES = flags.DEFINE_integer(
    "valid_samples", 4, "held-out text: draws per packed sequence", lower_bound=1
)
_DRAFT = flags.DEFINE_integer(
    "draft", 8, "held-out text: tokens per draft, to measure acceptance; 0: skip", lower_bound=0
)
_INFILL_WORDS = flags.DEFINE_integer(
    "infill_words",
    EvalSpec.infill_words,
    "held-out text, modes masked and monte_carlo: number of words to fill in; 0: skip",
    lower_bound=0,
)
_BY_DOCUMENT = flags.DEFINE_boolean(
    "by_document", False, "held-out text: also write the sums of each document, to compare runs by document"
)
_LIMIT = flags.DEFINE_integer("limit", 0, "maximum number of questions per task; 0: all", lower_bound=0)
_BASELINES = flags.DEFINE_list(
    "baselines",
    None,
    f"baselines of tasks with questions: {', '.join(BASELINES)}; default: all (unigram reads the run's "
    "corpus, and is left out if the corpus is not there); empty: none",
)
_DATA = cli.DEFINE_path(
    "data", "", "corpus with the held-out text, or NAME=CORPUS,... of sources; default: those of the run"
)
_OUTPUT = cli.DEFINE_path(
    "output",
    "",
    "JSON file for the results of this call only; default: merge them into eval/step_N.json in the run "
    "directory",
)
flags.mark_flags_as_required(["workdir"])


def main(_: Sequence[str]) -> None:
    cli.set_up_jax()
    spec = _spec()
    tasks = load_tasks(spec)
    for name, questions in tasks.items():
        files = describe_files(task_files(name, spec.task_data))
        say(f"{name}: {len(questions):,} questions from {files}")
    run = open_run(_WORKDIR.value, _CHECKPOINT.value, _PARAMETERS.value)
    default = results_file(run.workdir, run.step, run.parameters)
    path = user_path(_OUTPUT.value) if _OUTPUT.value else default
    check_output(path, "--output")
    if not _OUTPUT.value:
        read_results(default)  # fails early if the file is damaged

    if tasks and _BASELINES.value is None:
        spec = dataclasses.replace(spec, baselines=default_baselines(run))
    for results in evaluate_run(run, spec, tasks):
        content = results if _OUTPUT.value else merge(read_results(default), results)
        write_output(path, json.dumps(content, indent=1, allow_nan=False) + "\n", "--output")
    say(results_table(results, spec.modes))
    for text in results_warnings(results):
        warn(text)
    say(f"\nresults: {path}")


def _spec() -> EvalSpec:
    if not _MASKS.value or not all(n.isdigit() and int(n) > 0 for n in _MASKS.value):
        raise UserError(f"--masks={','.join(_MASKS.value)} must be positive integers, such as 1,4")
    tasks, modes = (list(dict.fromkeys(flag.value)) for flag in (_TASKS, _MODES))
    spec = EvalSpec(
        tasks, modes, _TASK_DATA.value, _LIMIT.value, tuple(map(int, _MASKS.value)), _SAMPLES.value,
        _VALID_SAMPLES.value, _DATA.value, list(dict.fromkeys(_BASELINES.value or ())), _DRAFT.value,
        _INFILL_WORDS.value, _BY_DOCUMENT.value,
    )  # fmt: skip
    spec.check()
    return spec


if __name__ == "__main__":
    cli.run(main)
