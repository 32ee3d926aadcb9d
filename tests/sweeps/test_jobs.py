"""The time that a sweep records and shows for cells that are stopped, fail and resume."""

import contextlib
import json
import shutil
import textwrap

import pytest
from etils import epath

from dualsm.evaluation.spec import EvalSpec
from dualsm.sweeps.cells import cell_record
from dualsm.sweeps.grid import make_cells
from dualsm.sweeps.jobs import run_missing
from dualsm.sweeps.sweep_folder import Sweep
from tests.micro import micro_config

MANY = 3000  # seconds; the processes of the tests take far less
# Each program is a process of the cell.
SAVE = """
    from pathlib import Path
    Path("checkpoints/4").mkdir(parents=True, exist_ok=True)
    Path("metrics.jsonl").write_text('{"step": 4, "train/loss": 2.0}\\n')
"""
STOP = """
    import os, signal, time
    os.kill(os.getppid(), signal.SIGTERM)  # the sweep
    time.sleep(60)  # the sweep ends this process
"""
FAIL = "\n    raise SystemExit(1)\n"
LOG = """
    from pathlib import Path
    Path("metrics.jsonl").write_text('{"step": 12, "train/loss": 2.0}\\n')
"""
FINISH = f"{LOG}    Path('checkpoints/12').mkdir(parents=True)\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a function that runs a cell as a program, and returns its `cell.json` and row."""
    (cell,) = make_cells({"repetitions": [1], "alpha": [0]})
    sweep = Sweep(epath.Path(tmp_path), "micro.py", {}, micro_config(), [cell])
    folder = tmp_path / "cells" / cell.name

    def run(program: str, seconds: float | None = None):
        """If `seconds` is given, the earlier sessions took this time."""
        if seconds is not None:
            outcome = json.loads((folder / "cell.json").read_text())
            (folder / "cell.json").write_text(json.dumps(outcome | {"seconds": seconds}))
        start = f"import os; os.makedirs({str(folder)!r}, exist_ok=True); os.chdir({str(folder)!r})\n"
        monkeypatch.setattr(sweep, "commands", lambda cell: [["-c", start + textwrap.dedent(program)]])
        with contextlib.suppress(KeyboardInterrupt):  # of `STOP`
            run_missing(sweep, jobs=1)
        path = folder / "cell.json"
        return (json.loads(path.read_text()) if path.exists() else None), sweep.row(cell)

    run.sweep, run.cell, run.folder = sweep, cell, folder
    return run


def test_a_stopped_cell_records_its_time_and_still_has_to_run(run):
    recorded, row = run(SAVE + STOP)
    assert recorded["status"] == row[1] == "running"
    assert 0 < recorded["seconds"] < 60
    assert run.sweep.outcome(run.cell) is None
    (run.folder / "config.json").write_text(run.sweep.configs[run.cell.name].to_json())
    record = cell_record(epath.Path(run.folder), run.cell.name, {})
    assert (record["status"], record["seconds"]) == ("running", recorded["seconds"])


def test_the_time_of_a_cell_is_that_of_all_its_sessions(run):
    """It is stopped, stopped again, fails, and finishes."""
    run(SAVE + STOP)
    stopped, _ = run(SAVE + STOP, MANY)
    failed, _ = run(FAIL, 2 * MANY)
    done, row = run(FINISH, 3 * MANY)
    assert [outcome["status"] for outcome in (stopped, failed, done)] == ["running", "failed", "done"]
    for sessions, outcome in enumerate((stopped, failed, done), 1):
        assert sessions * MANY < outcome["seconds"] < sessions * MANY + 60
    assert (row[1], row[-1]) == ("done", f"{done['seconds'] / 60:.1f}")


def test_sessions_without_a_checkpoint_do_not_count(run):
    """The cell starts from the beginning."""
    run(FAIL)
    failed, _ = run(FAIL, MANY)
    assert failed["status"] == "failed" and failed["seconds"] < 60
    stopped, _ = run(STOP, MANY)
    assert stopped is None


def test_an_unknown_time_is_blank(run):
    """A session was killed, or trained by another machine."""
    assert run.sweep.row(run.cell)[-1] == ""
    run(SAVE + STOP)
    (run.folder / "cell.json").unlink()  # as if the sweep had been killed
    assert run.sweep.row(run.cell)[1:3] == ["running", "4/12"]
    assert run.sweep.row(run.cell)[-1] == ""
    recorded, row = run(FINISH)
    assert (recorded["status"], recorded["seconds"], row[-1]) == ("done", None, "")


def test_a_stopped_cell_that_another_machine_finishes_is_done(run):
    run(SAVE + STOP)
    (run.folder / "metrics.jsonl").write_text('{"step": 12, "train/loss": 2.0}\n')
    (run.folder / "checkpoints" / "12").mkdir()
    recorded, row = run(FAIL)  # nothing is left to run
    assert (recorded["status"], recorded["seconds"], row[-1]) == ("done", None, "")


def test_a_cell_whose_last_save_failed_runs_again(run):
    failed, row = run(LOG + FAIL)
    assert failed["status"] == row[1] == "failed" and row[2] == "12/12"
    assert run.sweep.outcome(run.cell) is None
    (run.folder / "cell.json").unlink()  # as if a cluster had run the cell
    assert run(FAIL)[0]["status"] == "failed"
    assert run(FINISH)[0]["status"] == "done"


def test_a_cell_whose_evaluation_failed_is_done_without_the_evaluation(run):
    run.sweep.eval_spec = EvalSpec(["valid"], ["causal"])
    assert run(FINISH + FAIL)[0]["status"] == "failed"
    run.sweep.eval_spec = None  # the sweep command without `--tasks`
    recorded, row = run(FAIL, MANY)  # nothing is left to run
    assert recorded == {"status": "done", "reason": "", "seconds": MANY}
    assert row[1] == "done"


def test_a_done_cell_stays_done_without_its_checkpoints(run):
    """They may be deleted to free space."""
    done, _ = run(FINISH)
    shutil.rmtree(run.folder / "checkpoints")
    assert run(FAIL)[0] == done  # nothing is left to run
