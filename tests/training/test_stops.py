"""Stops during validation, lost checkpoints, delayed and repeated saves."""

import json
import shutil
import threading
from pathlib import Path

import jax
import pytest

from dualsm.data import verification
from dualsm.process.errors import UserError
from dualsm.rundir.checkpoint import Checkpoints
from dualsm.rundir.checkpoint_folder import LATEST
from dualsm.rundir.metrics import read_metrics
from dualsm.training import loop, run_corpora
from dualsm.training.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture
def small(micro, monkeypatch):
    """Returns a small config for one device, with validations of two batches after steps 0, 6 and 12."""
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    micro.optimizer.name = "adamw"
    micro.mixture.update({"causal": 1.0, "prefix": 0.0, "masked_diffusion": 0.0})
    micro.valid.objectives, micro.checkpoint.max_to_keep = "causal", 9
    return micro


def words_of(config, steps: float) -> str:
    """Returns the number of words that a run reads in a number of steps."""
    split = json.loads((Path(config.data.path) / "manifest.json").read_text())["splits"]["train"]
    return str(int(steps * config.batch_size * config.seq_len * split["words"] / split["tokens"]))


def learned(workdir) -> list[dict]:
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in read_metrics(workdir)]


def saved(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_stop_cancels_a_validation(small, tmp_path):
    """The resumed run repeats the validation, and its log equals that of an uninterrupted run."""
    assert train(small, tmp_path / "whole")
    workdir = tmp_path / "cut"
    for last in (6, 12):
        asked = []

        def stop(step, last=last, asked=asked):
            asked.append(step)
            return asked.count(last) == 3  # after the step, before the first batch, before the second

        assert not train(small, workdir, stop)
        assert asked.count(last) == 3
        assert saved(workdir)[-1] == last
        assert read_metrics(workdir)[-1]["step"] == last - 2
    assert train(small, workdir)
    assert learned(workdir) == learned(tmp_path / "whole")


def test_the_line_of_a_cancelled_validation_is_written_if_validations_become_rarer(small, tmp_path):
    asked = []

    def stop(step):
        asked.append(step)
        return asked.count(6) == 2

    assert not train(small, tmp_path, stop)
    assert read_metrics(tmp_path)[-1]["step"] == 4
    small.valid.every = 12
    assert train(small, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2, 4, 6, 8, 10, 12]


def test_run_with_lost_checkpoints_is_rejected(small, tmp_path):
    small.valid.objectives = ""
    assert not train(small, tmp_path, stop=lambda step: step == 4)
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    assert (tmp_path / LATEST).read_text() == "4\n"
    shutil.move(tmp_path / "checkpoints", tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(UserError, match=f"checkpoints of {tmp_path} are missing, the last was of step 4"):
            train(small, tmp_path)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)  # an empty folder is rejected too
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
    (tmp_path / "checkpoints").rmdir()
    shutil.move(tmp_path / "elsewhere", tmp_path / "checkpoints")
    assert not train(small, tmp_path, stop=lambda step: step == 5)
    assert saved(tmp_path) == [4, 5]


def test_save_delayed_by_a_skipped_update_follows_the_next_update(small, tmp_path, monkeypatch):
    """Steps 4 and 5 are reported as skipped; the save due at step 4 is made after step 6.

    A milestone at step 5 is saved at once, because only the checkpoint of its own step is kept for ever.
    """
    small.valid.objectives = ""
    compile_train_step = loop.compile_train_step

    def make(*args):
        program = compile_train_step(*args)

        def step(state, batch):
            done = int(state.step) + 1
            state, sums = program.step(state, batch)
            return state, sums._replace(consecutive_skips=jax.numpy.float32({4: 1, 5: 2}.get(done, 0)))

        return program._replace(step=step)

    monkeypatch.setattr(loop, "compile_train_step", make)
    assert train(small, tmp_path / "plain")
    assert saved(tmp_path / "plain") == [6, 8, 12]
    small.checkpoint.at_words = words_of(small, 4.5)
    assert train(small, tmp_path / "milestone")
    assert saved(tmp_path / "milestone") == [5, 8, 12]


def test_a_failed_save_of_a_milestone_is_reported(small, tmp_path, monkeypatch, capsys):
    """The disk check is patched to fail once, after step 5."""
    small.valid.objectives, small.checkpoint.at_words = "", words_of(small, 4.5)
    failures, probe = [5], Checkpoints._probe

    def fail(self):
        if saved(tmp_path) == [4] and failures:
            failures.pop()
            raise OSError(5, "the disk is away")
        probe(self)

    monkeypatch.setattr(Checkpoints, "_probe", fail)
    assert train(small, tmp_path)
    assert not failures and 5 not in saved(tmp_path)
    assert "step 5 is a milestone of config.checkpoint.at_words" in capsys.readouterr().err


def test_last_save_is_retried(small, tmp_path, monkeypatch, capsys):
    """The disk check is patched to fail twice during the last save (a milestone), `max_failed_saves` is 0."""
    small.checkpoint.at_words = words_of(small, 11.5)
    small.valid.objectives, small.checkpoint.max_failed_saves, small.checkpoint.final_retries = "", 0, 2
    failures, probe, pauses = [12, 12], Checkpoints._probe, []

    def fail(self):
        if saved(tmp_path) == [4, 8] and failures:
            failures.pop()
            raise OSError(5, "the disk is away")
        probe(self)

    monkeypatch.setattr(Checkpoints, "_probe", fail)
    monkeypatch.setattr("dualsm.rundir.checkpoint.time.sleep", pauses.append)
    assert train(small, tmp_path)
    assert saved(tmp_path) == [4, 8, 12] and not failures
    assert [pause for pause in pauses if pause >= 1] == [1, 2]
    said = capsys.readouterr().err
    assert said.count("step 12 could not be saved") == 2
    assert "is a milestone" not in said  # it is saved in the end


def test_stop_during_the_verification_before_the_first_save_saves(small, tmp_path, monkeypatch):
    """A preempted job does not wait for the hashes of its corpus; the resumed run is the same run."""
    small.valid.objectives = ""
    assert train(small, tmp_path / "whole")
    read, hash_of = threading.Event(), verification.sha256

    def wait(path):
        read.wait(60)
        return hash_of(path)

    monkeypatch.setattr(verification, "sha256", wait)
    monkeypatch.setattr(run_corpora, "_POLL_SECONDS", 0.01)
    asked = []

    def stop(step):
        asked.append(step)
        return asked.count(4) == 3  # after the step, and twice during the wait

    try:
        assert not train(small, tmp_path / "cut", stop)
    finally:
        read.set()
    assert asked.count(4) == 3 and saved(tmp_path / "cut") == [4]
    assert train(small, tmp_path / "cut")
    assert learned(tmp_path / "cut") == learned(tmp_path / "whole")
