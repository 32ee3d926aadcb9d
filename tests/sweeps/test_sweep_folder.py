"""The state of a cell, as the process that runs a sweep reads it."""

import json

import orbax.checkpoint as ocp
import pytest
from etils import epath

from dualsm.evaluation.spec import EvalSpec
from dualsm.sweeps import jobs
from dualsm.sweeps.grid import make_cells
from dualsm.sweeps.sweep_folder import Sweep
from tests.micro import micro_config


@pytest.fixture
def sweep(tmp_path):
    """Returns a sweep with one cell, which has been trained and not evaluated, and the cell."""
    (cell,) = make_cells({"repetitions": [1], "alpha": [0]})
    sweep = Sweep(
        epath.Path(tmp_path), "micro.py", {}, micro_config("corpus"), [cell], EvalSpec(["valid"], ["causal"])
    )
    (sweep.path(cell) / "checkpoints" / "12").mkdir(parents=True)
    lines = [json.dumps({"step": step, "train/loss": 2.0}) + "\n" for step in (6, 12)]
    (sweep.path(cell) / "metrics.jsonl").write_text("".join(lines))
    return sweep, cell


def commands(sweep, cell) -> list[str]:
    return [command[1] for command in sweep.remaining(cell)]


def test_the_state_of_a_cell_is_read_without_orbax(sweep, monkeypatch):
    """Orbax would initialize JAX's backend, and take the TPU away from the processes of the cells."""

    def fail(*args, **options):
        raise AssertionError("Orbax opens the checkpoints")

    monkeypatch.setattr(ocp, "CheckpointManager", fail)
    sweep, cell = sweep
    assert commands(sweep, cell) == ["dualsm.evaluate"]
    (sweep.path(cell) / "checkpoints" / "12").rmdir()
    assert commands(sweep, cell) == ["dualsm.train", "dualsm.evaluate"]


def test_only_an_empty_folder_of_a_cell_is_removed(tmp_path):
    """`epath.Path` does not list files such as "notes~", and its `rmdir` would delete them."""
    folder = epath.Path(tmp_path) / "cell"
    jobs._clear(folder)
    for name, kept in (("cell.json", False), ("notes~", True)):
        folder.mkdir()
        (folder / name).touch()
        jobs._clear(folder)
        assert folder.exists() == kept
