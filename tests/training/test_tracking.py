"""Data written by the experiment trackers, and their failures."""

import json
import resource
import struct
import threading
import time

import pytest

from dualsm.rundir import trackers
from dualsm.sweeps.cluster import job_list
from dualsm.sweeps.grid import Cell
from dualsm.sweeps.jobs import _Job
from dualsm.sweeps.sweep_folder import Sweep
from tests.micro import micro_config

LINES = [(0, {"valid/causal/loss": 6.0}), (2, {"train/loss": 5.5, "perf/mfu": 0.25})]


def read_events(workdir) -> list:
    """Returns all events in a run's TensorBoard folder; a record is length, checksum, data, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def read_scalars(events) -> list:
    lines = [(e.step, {v.tag: v.simple_value for v in e.summary.value if not v.metadata.plugin_data.content})
             for e in events]  # fmt: skip
    return [(step, values) for step, values in lines if values]


def test_tensorboard_contains_metrics_and_hyperparameters(tmp_path):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    config = micro_config()
    tracker = trackers.tensorboard(tmp_path, config, None)
    for step, metrics in LINES:
        tracker(step, metrics)
    # Before the tracker is closed, because a run may be killed at any time.
    events = read_events(tmp_path)
    assert read_scalars(events) == LINES
    tracker(None, {})

    (session,) = [v for e in events for v in e.summary.value if v.tag == "_hparams_/session_start_info"]
    assert session.metadata.plugin_data.plugin_name == "hparams"
    values = HParamsPluginData.FromString(session.metadata.plugin_data.content).session_start_info.hparams
    assert values["optimizer.learning_rate"].number_value == config.optimizer.learning_rate
    assert values["mixture.causal"].number_value == 0.5
    assert values["optimizer.name"].string_value == "muon"
    assert values["objectives.masked_diffusion.shifted"].bool_value is True


def test_tensorboard_hides_repeated_steps_of_a_resumed_run(tmp_path):
    for resumed_at, steps in ((None, (0, 2, 4)), (2, (4, 6))):
        tracker = trackers.tensorboard(tmp_path, micro_config(), resumed_at)
        for step in steps:
            tracker(step, {"train/loss": 1.0})
        tracker(None, {})
    starts = [e.step for e in read_events(tmp_path) if e.HasField("session_log")]
    assert starts == [0, 3]  # the second session hides the first from step 3 on
    assert [step for step, _ in read_scalars(read_events(tmp_path))] == [0, 2, 4, 4, 6]


@pytest.fixture
def full_disk():
    """Limits the size of all files of this process to 0; yields a function that removes the limit."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, old[1]))

    def free():
        resource.setrlimit(resource.RLIMIT_FSIZE, old)

    yield free
    free()


def test_full_disk_disables_a_tracker(tmp_path, capsys, request):
    tracker = trackers.tensorboard(tmp_path, micro_config(), None)
    tracker(*LINES[0])
    free = request.getfixturevalue("full_disk")
    for step in range(1, 50):  # more than the size of any queue
        tracker(step, {"train/loss": 1.0})
    free()
    tracker(50, {"train/loss": 1.0})
    tracker(None, {})
    warnings = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith("warning: TensorBoard failed")
    assert read_scalars(read_events(tmp_path))[0] == LINES[0]


def test_tracker_that_cannot_start_is_disabled(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    tracker = trackers.tensorboard(tmp_path, micro_config(), None)
    tracker(*LINES[0])
    tracker(None, {})
    assert capsys.readouterr().err.count("warning: TensorBoard failed") == 1


def test_failure_disables_a_tracker(capsys):
    shown = []

    def show(step, metrics):
        if step == 2:
            raise ConnectionError("the network\nis down")
        shown.append(step)

    tracker = trackers.Tracker("The tracker", lambda: show)
    for step in (1, 2, 3):
        tracker(step, {})
    assert shown == [1]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.endswith("ConnectionError: the network is down")


def test_closing_a_tracker_has_a_timeout(monkeypatch, capsys):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    end, closed = threading.Event(), []

    def show(step, metrics):
        if step is None:
            end.wait(30)
            closed.append(True)

    start = time.monotonic()
    trackers.Tracker("The tracker", lambda: show)(None, {})
    assert time.monotonic() - start < 10 and not closed
    assert "The tracker did not close within 0.2 s" in capsys.readouterr().err
    end.set()


@pytest.mark.extras
def test_wandb_offline_run_contains_config_and_metrics(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="needs wandb: pip install 'dualsm[wandb]'")
    for name, value in {"MODE": "offline", "SILENT": "true", "RUN_GROUP": "sweep"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    config = micro_config()
    config.log.wandb = "project"
    workdir = tmp_path / "repetitions=4,alpha=0.5"
    workdir.mkdir()
    tracker = trackers.wandb(workdir, config)
    for line in LINES:
        tracker(*line)
    tracker(None, {})
    assert "warning" not in capsys.readouterr().err

    (path,) = workdir.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # W&B's own process writes the file, later if the machine is busy
    while not any(record.HasField("exit") for record in read_wandb(path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    records = read_wandb(path)
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.project, run.run_group, run.display_name) == ("project", "sweep", workdir.name)
    assert run.run_id == (workdir / trackers.WANDB_ID).read_text().strip()
    told = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert told["optimizer"]["learning_rate"] == config.optimizer.learning_rate
    lines = [record.history for record in records if record.HasField("history")]
    for line, (step, metrics) in zip(lines, LINES, strict=True):
        values = {"/".join([item.key, *item.nested_key]).strip("/"): item.value_json for item in line.item}
        assert {name: json.loads(values[name]) for name in metrics} == metrics
        assert json.loads(values["_step"]) == step


def read_wandb(path) -> list:
    """Returns the records of a W&B file: a LevelDB log of blocks after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        at += -at % 32768 if -at % 32768 < 7 else 0  # records do not start in the last bytes of a block
        if kind in (1, 4):  # complete, or last part
            records.append(Record.FromString(record))
            record = b""
    return records


def test_runs_of_the_same_name_have_different_wandb_ids(tmp_path):
    from etils import epath

    first, second = (epath.Path(tmp_path / parent / "cell") for parent in ("a", "b"))
    first.mkdir(parents=True)
    second.mkdir(parents=True)
    assert trackers._wandb_id(first) == trackers._wandb_id(first) != trackers._wandb_id(second)


def test_cells_of_a_sweep_share_a_wandb_group(tmp_path, monkeypatch):
    cell = Cell("repetitions=4", {"repetitions": 4})
    sweep = Sweep(tmp_path / "my sweep", "recipe.py", {}, micro_config(), [cell])
    assert "\nexport WANDB_RUN_GROUP='my sweep'\n" in job_list(sweep, "slurm")
    show = "import os; print(os.environ['WANDB_RUN_GROUP'])"
    monkeypatch.setattr(sweep, "commands", lambda cell: [["-c", show]])
    job = _Job(sweep, cell, 0, 1)
    assert job.process.wait() == 0
    assert job.log.read_text() == "my sweep\n"
    monkeypatch.setenv("WANDB_RUN_GROUP", "chosen")
    assert sweep.environment() == {"WANDB_RUN_GROUP": "chosen"}
