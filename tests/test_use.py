"""Evaluating and sampling a trained run from the command line."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from dualsm.generation import generate
from dualsm.process.progress import LiveText
from dualsm.training.loop import train
from tests.commands import call_command
from tests.conftest import ROOT, command_env, run_command
from tests.test_commands import assert_one_line


@pytest.fixture(scope="module")
def workdir(corpus_path, tmp_path_factory):
    from tests.micro import micro_config

    config = micro_config(corpus_path)
    config.mesh.data = -1
    path = tmp_path_factory.mktemp("use") / "run"
    assert train(config, path)
    return path


@pytest.fixture(scope="module")
def task_data(tmp_path_factory):
    from tests.evaluation.test_tasks import ROWS, write

    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        write(folder, name, rows)
    return folder


def test_evaluate_writes_json_and_prints_a_table(workdir, task_data, tmp_path):
    process = run_command(
        "dualsm.evaluate", f"--workdir={workdir}", "--tasks=blimp,arc_easy,valid", f"--task_data={task_data}",
        "--modes=causal,prefix,masked,monte_carlo", "--samples=8", f"--output={tmp_path / 'scores.json'}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "scores.json").read_text())
    assert set(results["tasks"]) == {"blimp", "arc_easy"}
    for modes in results["tasks"].values():
        assert list(modes) == ["causal", "prefix", "masked", "monte_carlo"]
        for result in modes.values():
            assert {"score", "stderr", "n", "seconds", "settings"} <= set(result)
    assert results["tasks"]["arc_easy"]["causal"]["n"] == 3
    assert set(results["tasks"]["arc_easy"]["causal"]["baselines"]) == {"untrained", "unigram"}
    assert set(results["held_out"]) == {"causal", "prefix", "masked_diffusion"}
    assert results["held_out"]["masked_diffusion"]["samples"] == 4
    header = next(line for line in process.stdout.splitlines() if line.startswith("task"))
    assert header.split() == ["task", "metric", "n", "causal", "prefix", "masked", "monte_carlo"]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]  # no temporary files

    again = run_command(
        "dualsm.evaluate", f"--workdir={workdir}", "--tasks=blimp,arc_easy", f"--task_data={task_data}",
        "--modes=causal,prefix,masked,monte_carlo", "--samples=8", f"--output={tmp_path / 'again.json'}",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    tasks = json.loads((tmp_path / "again.json").read_text())["tasks"]
    assert without_seconds(tasks) == without_seconds(results["tasks"])


def without_seconds(tree):
    """Returns all results except times."""
    if isinstance(tree, dict):
        return {key: without_seconds(value) for key, value in tree.items() if key != "seconds"}
    return tree


def test_questions_with_too_long_answers_are_skipped(workdir, tmp_path):
    """Also if no question is left, and in an encoding without "±"."""
    from tests.evaluation.test_tasks import FALL, ROWS, write

    (good,), long = ROWS["piqa"], "heat it " * 32
    write(tmp_path, "piqa", [good, good | {"sol2": long}, good | {"goal": "Boil water " * 32}])
    write(tmp_path, "siqa", [FALL | {"label": "1", "answerB": long}])
    write(tmp_path, "blimp", ROWS["blimp"] * 2)
    process = run_command(
        "dualsm.evaluate", f"--workdir={workdir}", f"--task_data={tmp_path}", "--tasks=piqa,siqa,blimp",
        "--modes=causal,masked", f"--output={tmp_path / 'a.json'}",
        env={"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert r"\xb1" in process.stdout
    assert "piqa: 1 questions were skipped" in process.stderr
    assert "siqa: 1 questions were skipped" in process.stderr
    assert "piqa: 1 contexts were truncated" in process.stderr
    tasks = json.loads((tmp_path / "a.json").read_text())["tasks"]
    for mode in ("causal", "masked"):
        counts = {name: [tasks[name][mode][key] for key in ("n", "skipped")] for name in tasks}
        assert counts == {"piqa": [2, 1], "siqa": [0, 1], "blimp": [2, 0]}
        assert tasks["piqa"][mode]["contexts_truncated"] == 1  # the question has two answers
        assert tasks["piqa"][mode]["score"] is not None
        assert tasks["siqa"][mode]["score"] is tasks["siqa"][mode]["normalised"] is None


def test_inputs_are_checked_before_the_first_score(workdir, task_data, tmp_path):
    process = run_command(
        "dualsm.evaluate", f"--workdir={workdir}", "--tasks=blimp,valid", f"--task_data={task_data}",
        "--data=nowhere", f"--output={tmp_path / 'a.json'}",
    )  # fmt: skip
    assert_one_line(process, "nowhere")
    assert "blimp" not in process.stderr  # label of the progress bar


def test_results_are_written_after_each_mode(workdir, task_data, tmp_path):
    """The process is killed while it scores the second mode."""
    path = tmp_path / "a.json"
    command = [
        sys.executable, "-m", "dualsm.evaluate", f"--workdir={workdir}", "--tasks=blimp",
        f"--task_data={task_data}", "--modes=causal,monte_carlo", "--samples=1000000", f"--output={path}",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=command_env(), stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 300
        while not path.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    tasks = json.loads(path.read_text())["tasks"]
    assert list(tasks["blimp"]) == ["causal"]
    assert tasks["blimp"]["causal"]["n"] == 1


def test_held_out_scores_equal_those_of_training(workdir):
    from dualsm.rundir.metrics import read_metrics

    process = run_command("dualsm.evaluate", f"--workdir={workdir}", "--tasks=valid", "--valid_samples=1")
    assert process.returncode == 0, process.stderr
    results = json.loads((workdir / "eval" / "step_12.json").read_text())
    assert results["held_out"]["causal"]["n"] > 16  # training's validation is limited to 16 rows here
    assert results["held_out"]["causal"]["nats_per_token"] == pytest.approx(
        read_metrics(workdir)[-1]["valid/causal/loss"], rel=0.1
    )


def test_other_results_of_a_run_are_kept(workdir, task_data, tmp_path):
    run = shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    path = run / "eval" / "step_12.json"

    def evaluate(*arguments):
        flags = [f"--workdir={run}", f"--task_data={task_data}", "--draft=0", "--infill_words=0"]
        process = run_command("dualsm.evaluate", *flags, *arguments)
        assert process.returncode == 0, process.stderr
        return without_seconds(json.loads(path.read_text()))

    first = evaluate("--tasks=blimp,valid", "--modes=causal,prefix", "--valid_samples=1")
    second = evaluate("--tasks=arc_easy,valid", "--modes=causal,causal", "--limit=2", "--valid_samples=2",
                      "--baselines=")  # fmt: skip
    assert second["tasks"]["arc_easy"]["causal"]["baselines"] == {}
    assert second["tasks"]["blimp"] == first["tasks"]["blimp"]
    assert list(second["tasks"]["arc_easy"]) == ["causal"]
    assert [second["tasks"]["arc_easy"]["causal"][key] for key in ("n", "limit")] == [2, 2]
    assert second["held_out"]["prefix"] == first["held_out"]["prefix"]
    assert [r["held_out"]["causal"]["settings"]["samples"] for r in (first, second)] == [1, 2]
    path.write_text("{")
    assert_one_line(run_command("dualsm.evaluate", f"--workdir={run}"), "step_12.json", "move it or choose")


def test_training_settings_do_not_restrict_evaluation(workdir, tmp_path):
    """A GPU kernel, and a batch size that the devices do not divide."""
    run = shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["attention"], config["gradient_accumulation_steps"] = "flash", 8
    (run / "config.json").write_text(json.dumps(config))
    losses = []
    for number, folder in enumerate((workdir, run)):
        output = tmp_path / f"{number}.json"
        process = run_command(
            "dualsm.evaluate", f"--workdir={folder}", "--tasks=valid", "--modes=causal,masked", "--draft=0",
            "--infill_words=0", f"--output={output}", devices=4 if folder == run else 1,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        held_out = json.loads(output.read_text())["held_out"]
        losses.append([result["nats_per_token"] for result in held_out.values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    process = run_command("dualsm.sample", f"--workdir={run}", "--mode=diffusion", "--tokens=3")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("mode", ["causal", "prefix", "diffusion", "speculative"])
def test_sample_generates_in_every_mode(workdir, tmp_path, mode):
    output = tmp_path / "texts.jsonl"
    process = run_command(
        "dualsm.sample", f"--workdir={workdir}", f"--mode={mode}", "--prompt=def main(", "--prompt=import ",
        "--tokens=6", f"--output={output}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["def main(", "import "]
    for line in lines:
        assert line["text"].startswith(line["prompt"])
        shown = io.StringIO(line["text"], newline=None).read()  # newlines as `subprocess` reads them
        assert shown in process.stdout
    assert "tokens per second" in process.stderr
    if mode == "speculative":
        assert "tokens per forward pass" in process.stderr
        assert "accepted tokens per draft" in process.stderr
        assert "causal decoding" in process.stderr
    else:
        assert "forward passes per token" in process.stderr


def test_sample_fills_in_masks_and_keeps_the_rest(workdir, tmp_path):
    output = tmp_path / "texts.jsonl"
    process = run_command(
        "dualsm.sample", f"--workdir={workdir}", "--mode=diffusion", "--steps=2", f"--output={output}",
        "--prompt=def <mask:3>(self): return <mask>\n", "--watch",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (line,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert line["text"].startswith("def ")
    assert "(self): return " in line["text"]
    assert line["text"].endswith("\n")
    assert 4 not in line["tokens"]
    assert "░" in process.stdout  # masks, while unmasking


@pytest.mark.parametrize("mode", ["causal", "diffusion"])
def test_tokens_per_second_exclude_redrawing(workdir, monkeypatch, capsys, mode):
    """Redrawing the texts takes 1,000 seconds here."""
    drawn = []
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 1000 * len(drawn))
    monkeypatch.setattr(generate, "time", clock)
    monkeypatch.setattr(LiveText, "draw", lambda _, text: drawn.append(text))
    call_command(
        "sample", f"--workdir={workdir}", f"--mode={mode}", "--prompt=def ", "--tokens=24", "--watch"
    )
    assert len(drawn) > 2
    assert float(capsys.readouterr().err.split(" tokens per second")[0].split()[-1]) > 1


def test_sample_unmasks_blocks_with_a_cache(workdir, tmp_path):
    """The run was not trained on blocks, which the command says."""
    output = tmp_path / "texts.jsonl"
    process = run_command(
        "dualsm.sample", f"--workdir={workdir}", "--mode=diffusion", "--block=8", "--cache", "--tokens=12",
        "--prompt=def main(", "--prompt=import <mask:3> as x", f"--output={output}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines[0]["text"].startswith("def main(")
    assert lines[1]["text"].startswith("import ") and lines[1]["text"].endswith(" as x")
    assert all(4 not in line["tokens"] for line in lines)
    assert "approximation" in process.stderr and "not trained with block_diffusion" in process.stderr
    assert "nats per token with blocks of 8" in process.stderr
    passes = float(process.stderr.split(" forward passes per token")[0].split()[-1])
    assert 1 < passes < 1.5  # one per token, and one per block to store it


def test_prompts_are_read_from_a_file(workdir, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    outputs = []
    for name in ("prompts.jsonl", "prompts.txt"):
        process = run_command(
            "dualsm.sample",
            f"--workdir={workdir}",
            f"--prompts={tmp_path / name}",
            "--tokens=3",
            "--temperature=0",
        )
        assert process.returncode == 0, process.stderr
        outputs.append(process.stdout)
    assert outputs[0] == outputs[1]


def test_texts_are_written_despite_a_broken_pipe(workdir, tmp_path):
    path = tmp_path / "texts.jsonl"
    reader, writer = os.pipe()
    os.close(reader)
    command = [
        sys.executable, "-m", "dualsm.sample", f"--workdir={workdir}", "--prompt=\u2581\xe9", "--tokens=1",
        f"--output={path}",
    ]  # fmt: skip
    process = subprocess.run(
        command, cwd=ROOT, env=command_env() | {"PYTHONIOENCODING": "ascii"}, stdout=writer, timeout=300
    )
    os.close(writer)
    assert process.returncode == 141
    assert json.loads(path.read_text())["text"].startswith("\u2581\xe9")


def test_invalid_prompt_is_reported_with_its_line(workdir, tmp_path):
    path = tmp_path / "prompts.jsonl"
    for line, message in (
        ('{"prompt": 7}', "is not a string"),
        ('{"text": "b"}', "not a JSON object with a field"),
    ):
        path.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
        process = run_command("dualsm.sample", f"--workdir={workdir}", f"--prompts={path}")
        assert_one_line(process, f"line 3: {message}" if "JSON" in message else message)


def test_unshifted_models_are_rejected_for_diffusion(workdir, tmp_path):
    from tests.evaluation.test_tasks import ROWS, write

    write(tmp_path, "blimp", ROWS["blimp"])
    run = shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["objectives"]["masked_diffusion"]["shifted"] = False
    (run / "config.json").write_text(json.dumps(config))
    for command in (
        ("dualsm.evaluate", "--tasks=blimp", f"--task_data={tmp_path}", "--modes=causal,masked"),
        ("dualsm.sample", "--mode=diffusion"),
    ):
        assert_one_line(run_command(*command, f"--workdir={run}"), "shifted=False")


@pytest.mark.slow
def test_benchmarks_run(workdir, tmp_path):
    from tests.evaluation.test_tasks import ROWS, write

    write(tmp_path, "blimp", ROWS["blimp"] * 3)
    process = run_command(
        "benchmarks.scoring", f"--workdir={workdir}", f"--task_data={tmp_path}", "--pairs=3", "--samples=4",
        f"--output={tmp_path / 'scoring.json'}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    modes = json.loads((tmp_path / "scoring.json").read_text())["modes"]
    assert list(modes) == ["causal", "masked {1}", "masked {1,4}", "monte_carlo 4"]
    assert modes["causal"]["forwards"] == 2  # equal sentences are scored once
    process = run_command("benchmarks.attention", "--length=768", "--heads=1", "--width=8", "--rounds=1")
    assert process.returncode == 0, process.stderr
    process = run_command(
        "benchmarks/accelerator.py", "--config=tests/micro.py", "--config.model.vocab_size=128", "--rows=8",
        "--rounds=1", "--seconds=0.01", f"--output={tmp_path / 'accelerator.json'}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert list(json.loads((tmp_path / "accelerator.json").read_text())) == [
        "xla, matmuls, causal",
        "xla, matmuls, mixture",
    ]
    process = run_command(
        "benchmarks.decoding", f"--workdir={workdir}", "--positions=8,16", "--repeats=2", "--batch_sizes=1,2",
        "--drafts=0,2", "--tokens=6", "--runs=1", f"--output={tmp_path / 'decoding.json'}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "16 over 8" in process.stdout
    speeds = json.loads((tmp_path / "decoding.json").read_text())["speeds"]
    measured = [(speed["batch_size"], speed["mode"], speed["draft"]) for speed in speeds]
    modes = [("causal", 0), ("speculative", 0), ("speculative", 2)]
    assert measured == [(size, *mode) for size in (1, 2) for mode in modes]
    process = run_command(
        "benchmarks.unmasking", f"--workdir={workdir}", "--blocks=4", "--thresholds=0.5", "--texts=2",
        "--prompt_tokens=4", "--tokens=6", "--runs=1",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("diffusion") == 3 + 1  # three ways, and the line of the NELBO
    process = run_command(
        "benchmarks.greedy_equality", f"--workdir={workdir}", "--prompts=3", "--prompt_tokens=4",
        "--tokens=6", "--drafts=1,3", "--batch_sizes=1,2", f"--output={tmp_path / 'equality.json'}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    equal = [record["equal"] for record in json.loads((tmp_path / "equality.json").read_text())]
    assert equal == [3, 3, 3, 3]


BAD = {
    "no run": (["dualsm.sample", "--workdir=nowhere"], "nowhere"),
    "no checkpoint": (["dualsm.sample", "--workdir={workdir}", "--checkpoint=7"], "step 7"),
    "mask in causal": (["dualsm.sample", "--workdir={workdir}", "--prompt=a <mask>"], "--mode=diffusion"),
    "leading mask": (["dualsm.sample", "--workdir={workdir}", "--mode=telepathy"], "telepathy"),
    "temperature": (["dualsm.sample", "--workdir={workdir}", "--temperature=nan"], "temperature=nan"),
    "cache": (
        ["dualsm.sample", "--workdir={workdir}", "--cache"],
        "--cache has no effect with --mode=causal; use --mode=diffusion, or leave",
    ),
    "block": (["dualsm.sample", "--workdir={workdir}", "--mode=diffusion", "--cache"], "--block=32"),
    "draft": (
        ["dualsm.sample", "--workdir={workdir}", "--mode=diffusion", "--draft=2"],
        "--mode=speculative",
    ),
    "prompts": (["dualsm.sample", "--workdir={workdir}", "--prompts=nowhere.jsonl"], "nowhere.jsonl"),
    "task": (["dualsm.evaluate", "--workdir={workdir}", "--tasks=telepathy"], "telepathy"),
    "task data": (["dualsm.evaluate", "--workdir={workdir}", "--tasks=blimp"], "--task_data"),
    "mode": (["dualsm.evaluate", "--workdir={workdir}", "--modes=telepathy"], "telepathy"),
    "no task": (["dualsm.evaluate", "--workdir={workdir}", "--tasks="], "--tasks="),
    "no mode": (
        ["dualsm.evaluate", "--workdir={workdir}", "--tasks=blimp", "--task_data=x", "--modes="],
        "--modes=",
    ),
    "masks": (["dualsm.evaluate", "--workdir={workdir}", "--masks=0"], "--masks"),
    "no masks": (["dualsm.evaluate", "--workdir={workdir}", "--masks="], "--masks"),
    "output": (["dualsm.evaluate", "--workdir={workdir}", "--output=setup.py/a.json"], "--output"),
    "output folder": (
        ["dualsm.evaluate", "--workdir={workdir}", "--data=nowhere", "--output=tests/"],
        "--output=tests is a folder",
    ),
    "texts folder": (
        ["dualsm.sample", "--workdir={workdir}", "--output=tests/"],
        "--output=tests is a folder",
    ),
    "corpus": (["dualsm.evaluate", "--workdir={workdir}", "--data=nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_user_errors_are_one_line(case, workdir):
    arguments, expected = BAD[case]
    assert_one_line(run_command(*(argument.format(workdir=workdir) for argument in arguments)), expected)
