"""Multi-process jobs train like one process, save one checkpoint, and end together."""

import errno
import os
import re
import shlex
import shutil
import signal
import time

import jax
import pytest
from jax.errors import JaxRuntimeError

from dualsm.config import load_config
from dualsm.data.build import Recipe, build
from dualsm.process.distributed import _exit_message, job
from dualsm.process.errors import BucketError, UserError
from dualsm.rundir.metrics import read_metrics
from dualsm.training.loop import train
from tests.processes import MET_TOO_LATE, STOPPED, end, launch, start, write_recipe

pytestmark = pytest.mark.slow

SHORT = {"steps": 20, "log.every": 1, "valid.every": 20, "checkpoint.every": 10}


@pytest.fixture(scope="module")
def recipe(corpus_path, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe") / "short.py", corpus_path, **SHORT)


@pytest.fixture(scope="module")
def endless(corpus_path, tmp_path_factory):
    """Writes a config of a run that does not end by itself."""
    path = tmp_path_factory.mktemp("recipe") / "endless.py"
    changes = {"steps": 20_000, "repetitions": 80, "log.every": 1, "valid.every": 20_000}
    changes |= {"checkpoint.every": 20_000, "optimizer.name": "adamw"}  # compiles faster
    return write_recipe(path, corpus_path, **changes)


def train_here(config, workdir, devices: int, **mesh) -> None:
    """Trains in this process on some of its devices."""
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1} | mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:devices])
        assert train(config, workdir)


@pytest.fixture(scope="module")
def alone(recipe, corpus_path, tmp_path_factory):
    """Returns the run of one process with one device."""
    namespace: dict = {}
    exec(recipe.read_text(), namespace)
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train_here(namespace["get_config"](), workdir, 1)
    return workdir


@pytest.fixture(scope="module")
def two(recipe, tmp_path_factory):
    """Returns the run of two processes with four devices each, started by launch/local.sh."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    done = launch(2, 4, f"--config={recipe}", f"--workdir={workdir}", *mesh)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out bits per byte") == 1  # only process 0 prints
    return workdir


def assert_same_losses(workdir, reference, after: int = -1) -> None:
    """Compares the training and held-out losses of all objectives at every step."""
    ours, expected = read_metrics(workdir), read_metrics(reference)
    assert [r["step"] for r in ours] == [r["step"] for r in expected] == list(range(21))
    compared = 0
    for a, b in zip(ours, expected, strict=True):
        assert a.keys() == b.keys()
        for name in b:
            if name.endswith("loss") and a["step"] > after:
                assert a[name] == pytest.approx(b[name], abs=1e-5), (a["step"], name)
                compared += 1
    assert compared >= 20


def test_two_processes_train_as_one(alone, two):
    assert_same_losses(two, alone)
    assert {p.name for p in two.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "latest_checkpoint",
        "tokenizer.model",
        ".lock",
    }
    assert sorted(p.name for p in (two / "checkpoints").iterdir()) == ["10", "20"]


def test_tensor_axis_across_four_processes(recipe, alone, tmp_path):
    """Pairs of processes have the same rows and different halves of every matrix."""
    mesh = ["--config.mesh.data=2", "--config.mesh.tensor=4"]
    done = launch(4, 2, f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *mesh)
    assert done.returncode == 0, done.stderr
    assert_same_losses(tmp_path / "run", alone)


@pytest.mark.parametrize(("devices", "mesh"), [(8, {"data": 1, "fsdp": 8}), (1, {})], ids=["1x8", "1x1"])
def test_resuming_a_run_of_two_processes(two, alone, tmp_path, devices, mesh):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    train_here(load_config((workdir / "config.json").read_text()), workdir, devices, **mesh)
    assert_same_losses(workdir, alone)


@pytest.mark.parametrize("tensor", [1, 4])
def test_processes_read_only_their_rows(corpus_path, tensor):
    """With tensor=4 over 2 x 2 devices both processes need all rows; otherwise each needs half of them."""
    processes = start(2, 2, f"--corpus={corpus_path}", f"--tensor={tensor}", module="tests.gathered_batches")
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert f"rows {8 if tensor == 1 else 16} of 16" in errors


def started(recipe, workdir, tries: int = 3):
    """Starts two processes and waits for their third step."""
    processes = start(2, 1, f"--config={recipe}", f"--workdir={workdir}", f"--stopped_status={STOPPED}")
    while not workdir.exists() or len(read_metrics(workdir)) < 4:
        time.sleep(0.02)
        if any(process.poll() is not None for process in processes):
            errors = "\n".join(end(process) for process in processes)
            if MET_TOO_LATE in errors and tries > 1:
                return started(recipe, workdir, tries - 1)
            pytest.fail(errors)
    return processes


def test_sigterm_to_one_process_stops_all_after_the_same_step(endless, tmp_path):
    workdir = tmp_path / "a run's"
    processes = started(endless, workdir)
    os.kill(processes[1].pid, signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [STOPPED] * 2, outputs
    (saved,) = (workdir / "checkpoints").iterdir()
    assert read_metrics(workdir)[-1]["step"] == int(saved.name)
    _, _, command = outputs[0][0].partition("run the same command to resume:")
    assert shlex.split(command)[1:] == processes[0].args[1:]  # as parsed by a shell
    assert "resume" not in outputs[1][0]


def test_dead_process_ends_the_job(endless, tmp_path):
    processes = started(endless, tmp_path / "run")
    try:
        died = time.monotonic()
        processes[1].kill()
        _, errors = processes[0].communicate(timeout=60)
        assert time.monotonic() - died < 60
        assert processes[0].returncode not in (0, STOPPED)
        assert "process 0 of 2 lost the other processes" in errors
        assert "run the same command to resume" in errors
    finally:
        for process in processes:
            end(process)


def test_every_process_reports_a_user_error(recipe, tmp_path):
    done = launch(2, 1, f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "--config.batch_size=7")
    assert done.returncode == 2
    assert "error: process 0 of 2: config.batch_size=7 must be a multiple of the 2 devices" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def stale_corpus(jsonl, tmp_path_factory):
    """Returns a corpus with the same vocabulary size, made from half of the text."""
    folder = tmp_path_factory.mktemp("stale")
    lines = jsonl.read_text().splitlines(keepends=True)
    (folder / "half.jsonl").write_text("".join(lines[::2]))
    recipe = Recipe(input=str(folder / "half.jsonl"), vocab_size=512, valid_fraction=0.05)
    build(recipe, str(folder / "corpus"), workers=1, quiet=True)
    return folder / "corpus"


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (
            "--config.optimizer.learning_rate=1",
            "another config than process 0 (optimizer.learning_rate: 0.007",
        ),
        ("--config.checkpoint.every=7", "another config than process 0 (checkpoint.every: 10 -> 7)"),
        ("--config.data.path={stale}", "the corpus {stale} differs from that of process 0"),
        ("--config.data.path=/nowhere", "config.data.path: no corpus at '/nowhere'"),
    ],
)
def test_processes_that_disagree_end_before_anything_is_written(recipe, stale_corpus, tmp_path, own, told):
    own, told = (text.format(stale=stale_corpus) for text in (own, told))
    processes = start(2, 1, f"--config={recipe}", f"--workdir={tmp_path / 'run'}", last=(own,))
    errors = [process.communicate(timeout=280)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    assert "error: process 0 of 2: process 1: " in errors[0] and told in errors[0]
    assert "error: process 1 of 2: " in errors[1] and told in errors[1]
    assert not any("Traceback" in text or "Check failure" in text for text in errors)
    assert not (tmp_path / "run").exists()


def test_processes_wait_for_a_slow_main_process(tmp_path):
    """Slower than the timeouts of the first collective at the start and of JAX at the end."""
    processes = start(2, 1, module="tests.slow_process")
    outputs = [process.communicate(timeout=280) for process in processes]
    assert [process.returncode for process in processes] == [STOPPED] * 2, outputs


def test_processes_agree_on_a_failed_save_and_continue(corpus_path, tmp_path):
    """Only the main process has a full disk."""
    flags = (f"--corpus={corpus_path}", f"--workdir={tmp_path / 'run'}")
    processes = start(2, 1, *flags, module="tests.full_disk_process")
    errors = [process.communicate(timeout=280)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert all("the checkpoint of step 4 could not be saved" in text for text in errors), errors
    assert "process 0: [Errno 27]" in errors[1]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "6"]


def test_failures_of_single_processes_during_a_save_do_not_end_the_job(corpus_path, tmp_path):
    """One of four fails: before Orbax's first barrier at steps 4 and 10, while writing at 6 and 8."""
    flags = (f"--corpus={corpus_path}", f"--workdir={tmp_path / 'run'}")
    began = time.monotonic()
    processes = start(4, 1, *flags, module="tests.failing_save_process")
    errors = [process.communicate(timeout=280)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    assert time.monotonic() - began < 200  # no process waits for a timeout of Orbax
    for text in errors:
        for step in (4, 6, 8, 10):
            assert f"the checkpoint of step {step} could not be saved" in text, errors
    saved = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {2, 12} <= saved and not {4, 6, 8, 10} & saved


def test_disk_failure_is_one_line_and_ends_the_job(recipe):
    done = launch(2, 1, f"--config={recipe}", "--workdir=/proc/nothing")
    assert done.returncode == 2, done.stderr
    assert "error: process 0 of 2: [Errno 2]" in done.stderr
    assert "'/proc/nothing'; check free space, permissions and the disk" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "told", "status"),
    [
        (UserError("config.steps=0"), ": config.steps=0", 2),
        (OSError(errno.ENOSPC, "No space left on device"), "check free space", 2),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 7 bytes.\nWho"), "7 bytes.\\); to train, ", 2),
        (
            JaxRuntimeError("UNAVAILABLE: Task is gone\nDetails"),
            "lost the other processes .*Task is gone\\)$",
            1,
        ),
        (
            ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"),
            "lost the other processes",
            1,
        ),
        (JaxRuntimeError(""), "lost the other processes", 1),
        (BucketError(errno.EIO, "503", "gs://bucket/run"), "503.*; check the name of the bucket", 1),
        (ValueError("too many values to unpack"), "^$", 1),
    ],
)
def test_messages_of_a_process_that_ends(error, told, status):
    """An unexpected exception has no message; its traceback is printed."""
    text, code = _exit_message(error)
    assert re.search(told, text) and code == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=2"], "belong together"),
        (["--coordinator=here", "--processes=2", "--process_id=0"], "HOST:PORT"),
        (["--coordinator=here:1", "--processes=2", "--process_id=2"], "must be less than --processes=2"),
        (["--processes=1", "--process_id=3"], "--process_id=3 must be less than --processes=1"),
    ],
)
def test_invalid_jobs_are_rejected(recipe, tmp_path, arguments, message):
    values = {part.split("=")[0].strip("-"): part.split("=")[1] for part in arguments}
    coordinator = values.get("coordinator")
    numbers = [int(values[name]) if name in values else None for name in ("processes", "process_id")]
    with pytest.raises(UserError, match=message), job(coordinator, *numbers):
        pass
