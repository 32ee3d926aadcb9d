"""Failed saves are repeated with a backoff, during training and at its end."""

import contextlib

import jax
import pytest

from dualsm.process.errors import UserError
from dualsm.rundir import checkpoint
from dualsm.rundir.checkpoint import Checkpoints
from dualsm.training.loop import train


class Clock:
    """A clock that advances by one second per reading and by the pauses."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def small(micro, monkeypatch):
    """Returns a small config for one device that saves at the steps 4, 8 and 12, with a simulated clock."""
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    monkeypatch.setattr(checkpoint, "time", Clock())
    micro.optimizer.name = "adamw"
    micro.mixture.update({"causal": 1.0, "prefix": 0.0, "masked_diffusion": 0.0})
    micro.valid.objectives, micro.checkpoint.max_to_keep = "", 9
    return micro


def saved(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def fail_at(monkeypatch, steps: set[int], where: str) -> list[int]:
    """Lets saves of some steps fail before or after Orbax starts; returns the steps of all attempts."""
    attempts, save, wait = [], Checkpoints.save, checkpoint.ocp.CheckpointManager.wait_until_finished

    def note(self, step, *args, **options):
        attempts.append(step)
        return save(self, step, *args, **options)

    def fail_before(self):
        if attempts[-1] in steps:
            raise OSError(5, "the disk is away")

    def fail_in_background(self):
        wait(self)
        if attempts and attempts[-1] in steps and self._dualsm_step == attempts[-1]:
            self.delete(attempts[-1])
            raise OSError(5, "the connection was lost")

    start = checkpoint.ocp.CheckpointManager.save

    def started(self, step, *args, **options):
        self._dualsm_step = step
        return start(self, step, *args, **options)

    monkeypatch.setattr(Checkpoints, "save", note)
    if where == "before":
        monkeypatch.setattr(Checkpoints, "_probe", fail_before)
    else:
        monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "_dualsm_step", -1, raising=False)
        monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", started)
        monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", fail_in_background)
    return attempts


@pytest.mark.parametrize("where", ["before", "in the background"])
def test_failed_save_is_repeated_before_the_next_scheduled_one(small, tmp_path, monkeypatch, capsys, where):
    attempts = fail_at(monkeypatch, {4}, where)
    assert train(small, tmp_path)
    assert [step for step in attempts if step not in (4, 8, 12)]  # a repetition between the scheduled saves
    assert saved(tmp_path) == sorted(set(attempts) - {4})
    assert capsys.readouterr().err.count("could not be saved") == 1


def test_repetitions_do_not_count_as_failures_of_scheduled_saves(small, tmp_path, monkeypatch):
    """Only the scheduled saves at the steps 4 and 8 count towards `max_failed_saves`, which is 1."""
    small.checkpoint.max_failed_saves = 1
    attempts = fail_at(monkeypatch, set(range(1, 12)), "before")
    with pytest.raises(UserError, match="step 8 could not be saved .*2 consecutive failures"):
        train(small, tmp_path)
    assert {4, 8} < set(attempts) and attempts[-1] == 8
    pauses = [b - a for a, b in zip(attempts, attempts[1:], strict=False)]
    assert pauses[0] >= 1


def test_training_does_not_depend_on_failed_saves(small, tmp_path, monkeypatch):
    from tests.killing import problems

    assert train(small, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fail_at(patch, {4, 5, 8}, "before")
        assert train(small, tmp_path / "disturbed")
    assert not problems([], tmp_path / "disturbed", tmp_path / "whole")


def test_a_save_succeeds_without_the_file_of_the_latest_checkpoint(small, tmp_path):
    """Only the main process writes the file: its failure must not make the processes disagree."""

    class Unavailable:
        def write_text(self, text):
            raise RuntimeError("503")  # exceptions of gcsfs do not derive from OSError

    with contextlib.closing(Checkpoints(tmp_path, small.checkpoint)) as checkpoints:
        checkpoints._latest = Unavailable()
        checkpoints.save(3, {"a": jax.numpy.ones(2)}, last=True)
        small.checkpoint.final_retries = 0
        checkpoints.finish()
        assert checkpoints.newest() == 3
