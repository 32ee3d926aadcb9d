"""Runs depend on their config only, not on interruptions or devices."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dualsm.config import load_config
from dualsm.rundir.checkpoint_reader import restore_params
from dualsm.rundir.metrics import read_metrics
from dualsm.training.loop import train
from tests.conftest import ROOT, command_env

STEPS, LOG_EVERY, VALID_EVERY, SAVE_EVERY = 12, 2, 6, 4
LOGGED = [0, 2, 4, 6, 8, 10, 12]


@pytest.fixture(scope="module")
def recipe(corpus_path) -> str:
    """Writes a config file of the micro run."""
    return f"tests/micro.py:{corpus_path}"


def start(recipe: str, workdir: Path, *overrides: str, devices: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-m", "dualsm.train", f"--config={recipe}", f"--workdir={workdir}", *overrides]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=command_env(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def params_of(workdir: Path) -> dict:
    """Returns the parameters of the newest checkpoint, on the host."""
    from dualsm.model.transformer import init_params

    config = load_config((workdir / "config.json").read_text())
    shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    step, params = restore_params(workdir, shapes)
    assert step == STEPS
    return jax.tree.map(np.asarray, params)


def learned(record: dict) -> dict:
    """Returns the metrics of a log line that do not depend on time."""
    return {name: value for name, value in record.items() if not name.startswith("perf/")}


def assert_same_run(workdir: Path, reference: Path) -> None:
    """Asserts equality bit for bit, and that each step is logged once."""
    ours, expected = read_metrics(workdir), read_metrics(reference)
    assert [record["step"] for record in ours] == LOGGED
    assert [learned(record) for record in ours] == [learned(record) for record in expected]
    for a, b in zip(*map(jax.tree.leaves, (params_of(workdir), params_of(reference))), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(start(recipe, workdir))
    return workdir


def test_uninterrupted_run_writes_all_its_files(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {
        ".lock", "config.json", "metrics.jsonl", "checkpoints", "latest_checkpoint", "tokenizer.model",
    }  # fmt: skip
    assert sorted(int(p.name) for p in (uninterrupted / "checkpoints").iterdir()) == [8, 12]
    records = read_metrics(uninterrupted)
    assert [record["step"] for record in records] == LOGGED
    for record in records:
        validated = record["step"] % VALID_EVERY == 0
        assert ("valid/causal/bits_per_byte" in record) == validated
        assert ("train/loss" in record) == (record["step"] > 0)
    assert records[-1]["tokens"] == STEPS * 8 * 32
    assert records[-1]["epoch"] == 1.0
    assert records[-1]["train/loss"] < records[1]["train/loss"]
    expected = {"perf/tokens_per_second", "perf/mfu", "perf/data_wait_fraction", "perf/checkpoint_seconds"}
    assert expected <= set(records[1])


def test_one_device_per_core_trains_the_same_run(recipe, uninterrupted, tmp_path, monkeypatch):
    """Validates many batches, which must not block XLA's thread pool."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    flags = (
        "--config.mesh.data=2",
        "--config.gradient_accumulation_steps=4",
        "--config.valid.num_sequences=0",
    )
    finish(start(recipe, tmp_path, *flags))
    ours, expected = read_metrics(tmp_path), read_metrics(uninterrupted)
    assert [record["step"] for record in ours] == LOGGED
    for a, b in zip(ours[1:], expected[1:], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3)


def interrupted(recipe, workdir, lines: int, *flags: str, **options) -> subprocess.Popen:
    """Runs the command and sends SIGTERM after a number of log lines."""
    process = start(recipe, workdir, *flags, **options)
    while not workdir.exists() or len(read_metrics(workdir)) < lines:
        time.sleep(0.002)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    return process


def test_sigterm_saves_and_prints_the_command_to_resume(recipe, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = interrupted(recipe, workdir, 2)
    output = finish(process)
    assert "SIGTERM" in output
    assert f"--workdir={workdir}" in output
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir()]
    assert 0 < max(steps) < STEPS
    assert f"resuming {workdir} at step {max(steps)}" in finish(start(recipe, workdir))
    assert_same_run(workdir, uninterrupted)


def test_finished_run_is_not_changed(recipe, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    output = finish(start(recipe, uninterrupted))
    assert "held-out bits per byte" in output
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_damaged_newest_checkpoint_is_skipped(recipe, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    finish(start(recipe, workdir))
    newest = workdir / "checkpoints" / "12"
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    output = finish(start(recipe, workdir))
    assert "skipped the damaged checkpoint" in output
    assert "Traceback" not in output
    assert f"at step {SAVE_EVERY * 2}" in output
    assert_same_run(workdir, uninterrupted)


@pytest.mark.parametrize("overrides", [("data=8",), ("data=2", "fsdp=2", "tensor=2")], ids=str)
def test_losses_on_eight_devices_equal_those_on_one(recipe, uninterrupted, tmp_path, overrides):
    flags = [f"--config.mesh.{override}" for override in overrides]
    finish(start(recipe, tmp_path / "run", *flags, devices=8))
    ours, expected = read_metrics(tmp_path / "run"), read_metrics(uninterrupted)
    for a, b in zip(ours, expected, strict=True):
        for name in learned(b):
            if name.endswith("loss"):
                assert a[name] == pytest.approx(b[name], abs=1e-5), (a["step"], name)


def test_resuming_on_another_mesh_and_accumulation(recipe, uninterrupted, tmp_path):
    """Stops on eight devices and resumes on one with two gradient accumulation steps."""
    workdir = tmp_path / "run"
    process = interrupted(recipe, workdir, 3, "--config.mesh.data=2", "--config.mesh.fsdp=4", devices=8)
    finish(process)
    finish(start(recipe, workdir, "--config.mesh.data=1", "--config.gradient_accumulation_steps=2"))
    for a, b in zip(read_metrics(workdir), read_metrics(uninterrupted), strict=True):
        assert a["step"] == b["step"]
        for name in learned(b):
            if name.endswith("loss"):
                assert a[name] == pytest.approx(b[name], abs=2e-5), (a["step"], name)


def test_checkpoints_are_kept_as_configured(micro, tmp_path):
    micro.checkpoint.every, micro.checkpoint.max_to_keep, micro.checkpoint.keep_period = 1, 2, 5
    micro.valid.objectives = "causal"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        assert train(micro, tmp_path / "run")
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == [5, 10, 11, 12]


def test_incomplete_last_line_is_ignored(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "tr')
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert os.path.exists(tmp_path / "metrics.jsonl")


def test_second_signal_kills_the_run(recipe, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = interrupted(recipe, workdir, 4)
    while "send it again to quit" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, 0)  # 0: the save finished before the second signal
    finish(start(recipe, workdir))
    assert_same_run(workdir, uninterrupted)


def test_repeated_signal_within_a_second_is_ignored():
    """SLURM may send SIGTERM twice; a later signal ends the process."""
    code = "import time; from dualsm.train import _stop; asked = []; _stop(15, asked); _stop(15, asked); "
    code += "print('went on', flush=True); time.sleep(1.1); _stop(15, asked); print('too far')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "went on\n")
