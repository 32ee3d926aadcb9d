"""Results in the layout that lm-evaluation-harness writes, for the leaderboards and plots that read it.

Its layout has one number for a task and metric, so each mode is a model of its own there, with its own file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from dualsm import __version__
from dualsm.evaluation.tasks import Question
from dualsm.rundir.results import HELD_OUT

# In place of a task's version: prompts and metrics are those of docs/evaluation.md, not the harness's.
VERSION = f"dualsm {__version__}"


def layout(
    results: Mapping,
    mode: str,
    questions: Mapping[str, Sequence[Question]],
    held_out: Mapping | None,
    config: Mapping,
    started: float,
    seconds: float,
) -> dict:
    """One mode's part of what `dualsm.evaluate` writes, as lm_eval 0.4.13 has it (its `result_schema.py`).

    Args:
      results: all that `dualsm.evaluate` writes.
      mode: which of its modes.
      questions: of each task, all that there are, before `--limit`.
      held_out: the mode's loss on held-out text, as in `results`; None: it was not asked for.
      config: more to say about how the model was evaluated.
      started: seconds since 1970.
      seconds: that the evaluation took.

    Returns:
      A JSON object. Tasks with groups (BLiMP's paradigms, MMLU's subjects) are a group there with a task
      each.
    """
    scores, subtasks, arguments = {}, {}, {}
    for name, modes in results["tasks"].items():
        result = modes[mode]
        arguments = {key: value for key, value in result["settings"].items() if key != "longest"}
        judged = {key: (j["accuracy"], j["stderr"]) for key, j in result["metrics"].items()}
        scores[name] = _scores(name, result["n"], judged)
        for group, part in result["groups"].items():
            judged = {result["metric"]: (part["score"], part["stderr"])}
            scores[f"{name}_{group}"] = _scores(f"{name}_{group}", part["n"], judged)
        if result["groups"]:
            subtasks[name] = [f"{name}_{group}" for group in result["groups"]]
    if held_out:
        bits = held_out["bits_per_byte"]
        judged = {"bits_per_byte": (bits, None), "byte_perplexity": (2**bits, None)}
        scores[HELD_OUT] = _scores(HELD_OUT, held_out["n"], judged)

    model_name = f"{Path(results['workdir']).resolve().name}-{results['checkpoint']}-{mode}"
    arguments = {"workdir": results["workdir"], "checkpoint": results["checkpoint"], "mode": mode} | arguments
    originals = _sizes(questions)
    return {
        "results": scores,
        **({"groups": {name: scores[name] for name in subtasks}} if subtasks else {}),
        "group_subtasks": subtasks,
        "configs": {name: _task_config(name, _metrics(values)) for name, values in scores.items()},
        "versions": dict.fromkeys(scores, VERSION),
        "n-shot": dict.fromkeys(scores, 0),
        "higher_is_better": {
            name: dict.fromkeys(_metrics(values), name != HELD_OUT) for name, values in scores.items()
        },
        "n-samples": {
            name: {"original": originals.get(name, values["sample_len"]), "effective": values["sample_len"]}
            for name, values in scores.items()
        },
        "config": {"model": "dualsm", "model_args": arguments, **config},
        "date": started,
        "model_source": "dualsm",
        "model_name": model_name,
        "model_name_sanitized": re.sub(r"[^\w.,=+-]+", "__", model_name),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": False,
        "chat_template": None,
        "chat_template_sha": None,
        "task_hashes": {},
        "total_evaluation_time_seconds": str(seconds),
    }


def results_path(folder: Path, results: Mapping) -> Path:
    """Where lm_eval would put them: a folder for the model, a file named after the time."""
    date = datetime.fromtimestamp(results["date"]).isoformat().replace(":", "-")
    return folder / results["model_name_sanitized"] / f"results_{date}.json"


def _scores(name: str, n: int, judged: Mapping[str, tuple[float, float | None]]) -> dict:
    """A task's entry. `none` is the filter that the answers went through."""
    entry: dict = {"name": name, "alias": name, "sample_len": n}
    for metric, (value, stderr) in judged.items():
        if value is None:  # every question was skipped
            continue
        entry[f"{metric},none"] = value
        entry[f"{metric}_stderr,none"] = "N/A" if stderr is None else stderr
    return entry


def _metrics(entry: Mapping) -> list[str]:
    names = [key.removesuffix(",none") for key in entry if key.endswith(",none")]
    return [name for name in names if not name.endswith("_stderr")]


def _task_config(name: str, metrics: Sequence[str]) -> dict:
    is_task = name != HELD_OUT
    return {
        "task": name,
        "output_type": "multiple_choice" if is_task else "loglikelihood_rolling",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean" if is_task else metric, "higher_is_better": is_task}
            for metric in metrics
        ],
        "metadata": {"version": VERSION},
    }


def _sizes(questions: Mapping[str, Sequence[Question]]) -> Counter[str]:
    """Questions of each task, and of each of its groups."""
    sizes: Counter[str] = Counter()
    for name, asked in questions.items():
        sizes[name] = len(asked)
        sizes.update(f"{name}_{question.group}" for question in asked if question.group)
    return sizes
