"""Compares scores and time with lm-evaluation-harness's own `hf` model, on the same items and tokens.

    python -m dualsm.convert export --format=huggingface --workdir=runs/smollm2 --output=exported
    JAX_PLATFORMS=cpu python benchmarks/lm_eval_peer.py --workdir=runs/smollm2 --exported=exported \\
        --task_data=eval

`eval` contains hellaswag/*.jsonl and arc_easy/*.jsonl. Both models score causally and prepend BOS. Before,
dualsm scores the same questions once, so that compilation does not count; the `hf` model, which is not
compiled, scores a few. Needs the extras `eval` and `test-hf`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from dualsm.evaluation import harness
from dualsm.process import cli
from dualsm.process.output import write_output
from dualsm.process.progress import say, table

_WORKDIR = cli.DEFINE_path("workdir", None, "run directory")
_EXPORTED = cli.DEFINE_path("exported", None, "the same run, exported for transformers")
_TASK_DATA = cli.DEFINE_path("task_data", None, "folder that contains hellaswag/ and arc_easy/")
_ITEMS = flags.DEFINE_integer("items", 200, "questions per task", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 16, "batch size of the hf model", lower_bound=1)
_WARM_UP = flags.DEFINE_bool(
    "warm_up", True, "score the questions once before, so that compilation is not timed"
)
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")
flags.mark_flags_as_required(["workdir", "exported", "task_data"])

# Text, choices and target of each question, as in the harness's own tasks.
_TASKS = {
    "hellaswag": ("{{activity_label}}: {{ctx}}", "{{endings}}", "{{label}}"),
    "arc_easy": (
        "Question: {{question}}\nAnswer:",
        "{{choices.text}}",
        "{{choices.label.index(answerKey)}}",
    ),
}


def write_tasks(folder: Path) -> None:
    """Writes one task of the harness per local task file."""
    for name, (text, choices, target) in _TASKS.items():
        files = sorted(map(str, (Path(_TASK_DATA.value) / name).glob("*.jsonl")))
        task = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": files}},
            "output_type": "multiple_choice",
            "validation_split": "validation",
            "doc_to_text": text,
            "doc_to_choice": choices,
            "doc_to_target": target,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is valid YAML


def evaluate(model, folder: Path, task: str, items: int) -> dict:
    """Evaluates a model of the harness; returns log-likelihoods, accuracies and times."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    start, cpu_start = time.perf_counter(), time.process_time()
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[f"local_{task}"],
        limit=items,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    samples = sorted(found["samples"][f"local_{task}"], key=lambda sample: sample["doc_id"])
    scores = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    result = found["results"][f"local_{task}"]
    return {
        "scores": scores,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        **{key: result[f"{key},none"] for key in ("acc", "acc_norm")},
    }


def main(argv: Sequence[str]) -> None:
    del argv
    cli.set_up_jax()
    from lm_eval.models.huggingface import HFLM

    models = {
        "dualsm": harness.register()(workdir=str(_WORKDIR.value)),
        "hf": HFLM(
            pretrained=str(_EXPORTED.value),
            dtype="float32",
            device="cpu",
            batch_size=_BATCH.value,
            add_bos_token=True,
        ),
    }
    results, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        for task in _TASKS:
            found = {}
            for name, model in models.items():
                if _WARM_UP.value:
                    evaluate(model, Path(folder), task, _ITEMS.value if name == "dualsm" else 8)
                found[name] = evaluate(model, Path(folder), task, _ITEMS.value)
            ours, theirs = (np.concatenate(found[name]["scores"]) for name in models)
            largest = float(np.abs(ours - theirs).max())
            ratios = {name: found["dualsm"][name] / found["hf"][name] for name in ("seconds", "cpu_seconds")}
            results[task] = found | {"largest_difference": largest, "ratios": ratios}
            rows += [
                [task, name, *(f"{f[key]:.3f}" for key in ("acc", "acc_norm"))]
                + [f"{f[key]:.1f}" for key in ("seconds", "cpu_seconds")]
                for name, f in found.items()
            ]
            times = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            say(f"{task}: {len(ours)} answers, largest difference {largest:.2g} nats; ratio of {times}")
    say(table(["task", "model", "acc", "acc_norm", "seconds", "CPU seconds"], rows))
    if _OUTPUT.value:
        write_output(Path(_OUTPUT.value), json.dumps(results, indent=1) + "\n", "--output")


if __name__ == "__main__":
    cli.run(main)
