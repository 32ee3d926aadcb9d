"""Profiles contain exactly the requested steps and do not change the run."""

import jax
import pytest

from dualsm.process.errors import UserError
from dualsm.rundir.metrics import read_metrics
from dualsm.training.loop import train
from dualsm.training.profile import Window, parse_window

pytestmark = pytest.mark.slow


@pytest.fixture
def config(micro):
    micro.mesh.data = -1  # all devices of the tests
    return micro


def traced(workdir) -> tuple[set[int], int]:
    """Returns the steps in a trace, and the number of executions of the train step."""
    (path,) = (workdir / "profile").glob("plugins/profile/*/*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
    ]
    steps = {int(dict(event.stats)["step_num"]) for event in events if event.name == "train"}
    return steps, sum("train_step" in event.name for event in events)


def run(config, workdir, window: Window | None, stop=lambda step: False) -> list[float]:
    """Returns the losses of a profiled run."""
    train(config, workdir, stop, window)
    return [line["train/loss"] for line in read_metrics(workdir) if "train/loss" in line]


def test_trace_contains_the_steps_and_losses_are_unchanged(config, tmp_path, capsys):
    losses = run(config, tmp_path / "profiled", Window(4, 6))
    steps, programs = traced(tmp_path / "profiled")
    assert {4, 5, 6} <= steps <= {4, 5, 6, 7}, steps
    assert programs >= 3
    assert "profile of steps 4 to 6" in capsys.readouterr().out
    assert losses == run(config, tmp_path / "plain", None)
    assert not (tmp_path / "plain" / "profile").exists()


def test_window_ends_with_the_run_and_continues_on_resume(config, tmp_path):
    run(config, tmp_path, None, lambda step: step == 8)
    run(config, tmp_path, Window(5, 99))
    assert traced(tmp_path)[0] == {10, 11, 12}  # the first step after a start compiles


def test_missed_window_is_a_warning(config, tmp_path, capsys):
    run(config, tmp_path, Window(50, 60))
    assert "did not train these steps" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("text", ["", "5", "5:4", "1:4", "a:b", "5:6:7", "-1:4", "2:9999999999"])
def test_invalid_windows_are_rejected(text):
    with pytest.raises(UserError, match="FIRST:LAST"):
        parse_window(text)
