"""Flags that have no effect with the other flags are rejected in one line."""

import json

import pytest

from dualsm.data.build import Recipe, build
from dualsm.evaluation.spec import EvalSpec
from dualsm.process.errors import UserError
from tests.commands import call_command

AVERAGE = ["convert", "average", "--workdir=x", "--output=y", "--last=2"]
EXPORT = ["convert", "export", "--workdir=x", "--output=y"]
IMPORT = ["convert", "import", "--workdir=x", "--weights=y"]
SWEEP = ["sweep", "--config=tests/micro.py:", "--workdir=x"]
CASES = {
    "average, parameters": (
        [*AVERAGE, "--parameters=ema"],
        "--parameters=ema has no effect with average; use export",
    ),
    "average, checkpoint": (
        [*AVERAGE, "--checkpoint=0"],
        "--checkpoint=0 has no effect with average; use export",
    ),
    "average, format": (
        [*AVERAGE, "--format=huggingface"],
        "--format=huggingface has no effect with average; use import or export, or leave the flag out",
    ),
    "average, dtype": ([*AVERAGE, "--dtype=float16"], "--dtype=float16 has no effect with average"),
    "average, weights": ([*AVERAGE, "--weights=y"], "--weights=y has no effect with average; use import"),
    "average, config": (
        [*AVERAGE, "--config=tests/micro.py:"],
        "--config=tests/micro.py: has no effect with average; use import",
    ),
    "import, parameters": (
        [*IMPORT, "--format=reference", "--parameters=ema"],
        "--parameters=ema has no effect with import; use export",
    ),
    "import, output": ([*IMPORT, "--format=reference", "--output=z"], "--output=z has no effect with import"),
    "import, mask token": (
        [*IMPORT, "--format=reference", "--mask_token=<m>"],
        "--mask_token=<m> has no effect with --format=reference; use --format=huggingface",
    ),
    "export, tokenizer": (
        [*EXPORT, "--format=reference", "--tokenizer=t"],
        "--tokenizer=t has no effect with export",
    ),
    "export, checkpoints": (
        [*EXPORT, "--format=reference", "--checkpoints=4,8"],
        "--checkpoints=4,8 has no effect with export; use average",
    ),
    "export, last": (
        [*EXPORT, "--format=reference", "--last=2"],
        "--last=2 has no effect with export; use average",
    ),
    "export, own code": (
        [*EXPORT, "--format=reference", "--own_code"],
        "--own_code has no effect with --format=reference; use --format=huggingface",
    ),
    "export, milestones": (
        [*EXPORT, "--format=reference", "--milestones"],
        "--milestones has no effect with --format=reference",
    ),
    "export, milestones and checkpoint": (
        [*EXPORT, "--format=huggingface", "--milestones", "--checkpoint=3"],
        "--checkpoint=3 has no effect with --milestones",
    ),
    "sample, draft": (
        ["sample", "--workdir=x", "--mode=diffusion", "--draft=2"],
        "--draft=2 has no effect with --mode=diffusion; use --mode=speculative",
    ),
    "sample, top p": (
        ["sample", "--workdir=x", "--temperature=0", "--top_p=0.5"],
        "--top_p=0.5 has no effect with --temperature=0; use a higher --temperature, or leave the flag out",
    ),
    "sample, top k": (
        ["sample", "--workdir=x", "--temperature=0.000001", "--top_k=5"],
        "--top_k=5 has no effect with --temperature=1e-06",
    ),
    "sweep, limit": ([*SWEEP, "--limit=3"], "--limit=3 has no effect with --tasks=; use --tasks=NAME"),
    "sweep, modes": ([*SWEEP, "--modes=causal"], "--modes=causal has no effect with --tasks="),
    "sweep, task data": ([*SWEEP, "--task_data=eval"], "--task_data=eval has no effect with --tasks="),
    "sweep, unused task data": (
        [*SWEEP, "--tasks=valid", "--task_data=eval"],
        "--task_data=eval has no effect; it needs a task with questions in --tasks",
    ),
    "sweep, jobs": (
        [*SWEEP, "--launch=tpu", "--jobs=2"],
        "--jobs=2 has no effect with --launch=tpu; use --launch=here or --launch=slurm",
    ),
    "prepare, valid fraction": (
        ["prepare", "--input=a", "--output=b", "--valid_input=c", "--valid_fraction=0.5"],
        "--valid_fraction=0.5 has no effect with --valid_input=FILES",
    ),
    "evaluate, limit": (
        ["evaluate", "--workdir=x", "--limit=5"],
        "--limit=5 has no effect; it needs a task with",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_commands_reject_flags_without_effect(case):
    arguments, message = CASES[case]
    with pytest.raises(UserError) as error:
        call_command(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tasks", "modes", "options", "needed"),
    [
        ("blimp", "causal", {"data": "corpus"}, "--data=corpus has no effect; it needs --tasks=valid"),
        ("blimp", "causal", {"valid_samples": 2}, "--tasks=valid"),
        ("blimp", "causal", {"draft": 4}, "--tasks=valid"),
        ("blimp", "masked", {"infill_words": 9}, "--tasks=valid"),
        ("valid", "causal", {"infill_words": 9}, "a mode with masks in --modes"),
        ("valid", "causal", {"limit": 9}, "a task with questions in --tasks"),
        ("valid", "causal", {"baselines": ["untrained"]}, "a task with questions in --tasks"),
        ("blimp", "causal", {"masks": (1, 2)}, "--masks=1,2 has no effect; it needs masked in --modes"),
        ("valid", "masked", {"masks": (1, 2)}, "a task with questions"),
        ("blimp", "masked", {"samples": 9}, "monte_carlo in --modes"),
        ("valid", "monte_carlo", {"samples": 9}, "a task with questions"),
    ],
)
def test_evaluations_reject_options_that_no_task_and_mode_uses(tasks, modes, options, needed):
    folder = {"task_data": "eval"} if tasks == "blimp" else {}
    with pytest.raises(UserError, match="has no effect") as error:
        EvalSpec([tasks], [modes], **folder | options).check()
    assert needed in str(error.value)
    EvalSpec(["blimp", "valid"], ["masked", "monte_carlo"], **{"task_data": "eval"} | options).check()


def test_skipped_measurements_need_no_held_out_text():
    EvalSpec(["blimp"], ["causal"], "eval", draft=0, infill_words=0).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"vocab_size": 384, "tokenizer": "t.model", "tokenizer_bytes": 9},
            "--tokenizer_bytes=9 has no effect with --tokenizer; pass --vocab_size=N instead of --tokenizer",
        ),
        (
            {"tokenizer": "t.model", "tokenizer_bytes": 9},
            "--tokenizer_bytes=9 has no effect with --tokenizer; pass --vocab_size=N instead of --tokenizer",
        ),
        (
            {"vocab_size": 384, "text_key": "body"},
            "--text_key=body names fields or columns, but the input has none",
        ),
    ],
)
def test_corpora_reject_options_without_effect(options, message, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    with pytest.raises(UserError, match=message):
        build(Recipe(str(tmp_path / "a.txt"), **options), str(tmp_path / "out"), 1, quiet=True)
    assert not (tmp_path / "out").exists()


def test_fields_of_some_of_the_inputs_suffice(tmp_path, documents):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    lines = "".join(json.dumps({"body": text}) + "\n" for text in documents[:40])
    (tmp_path / "b.jsonl").write_text(lines)
    recipe = Recipe(str(tmp_path), vocab_size=384, text_key="body", valid_fraction=0.3)
    assert build(recipe, str(tmp_path / "out"), 1, quiet=True)["splits"]["train"]["documents"] > 10
