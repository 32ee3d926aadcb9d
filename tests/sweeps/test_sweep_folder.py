"""The state of a cell, as the process that runs a sweep reads it."""

import json

import orbax.checkpoint as ocp
import pytest
from etils import epath

from dualsm.evaluation.spec import EvalSpec
from dualsm.process import paths
from dualsm.sweeps import jobs, sweep_folder
from dualsm.sweeps.grid import make_cells
from dualsm.sweeps.sweep_folder import Sweep, _divergence
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


def test_a_failed_request_to_a_bucket_does_not_end_a_sweep(sweep, monkeypatch):
    """The status table shows the last row; the outcome of a cell, which decides, is read with retries."""
    sweep, cell = sweep
    shown, read = sweep.row(cell), sweep_folder.size_and_time
    failures = []

    def fail(path):
        if failures:
            raise failures.pop()
        return read(path)

    monkeypatch.setattr(sweep_folder, "size_and_time", fail)
    failures.append(RuntimeError("503"))  # exceptions of gcsfs do not derive from OSError
    with pytest.raises(RuntimeError):  # a local folder
        sweep.row(cell)
    monkeypatch.setattr(sweep_folder, "is_remote", lambda path: True)
    monkeypatch.setattr(sweep_folder, "retry", paths._retry)
    monkeypatch.setattr(paths.time, "sleep", lambda seconds: None)
    for error in (RuntimeError("503"), ConnectionResetError("reset")):
        failures.append(error)
        assert sweep.row(cell) == shown and not failures
        failures += [error, error]
        assert commands(sweep, cell) == ["dualsm.evaluate"] and not failures
    sweep._rows.clear()
    failures.append(RuntimeError("503"))
    assert sweep.row(cell) == [cell.name, *[""] * (len(shown) - 1)]


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ({"masked_diffusion": 5.0}, ""),
        ({"causal": 4.0, "masked_diffusion": 13.0}, "masked_diffusion"),
        ({"causal": 4.0, "web/causal": 4.0, "code/causal": 3.0}, ""),
        ({"causal": 8.0, "web/causal": 20.0, "code/causal": 3.0}, "web/causal"),
        ({"mir/causal": 4.0, "mir/masked_input_causal": 5.0}, ""),
        ({"mir/causal": 4.0, "mir/masked_input_causal": 14.0}, "mir/masked_input_causal"),
    ],
)
@pytest.mark.parametrize("weight", [0.1, 8])
def test_divergence_does_not_depend_on_the_weights_of_objectives(losses, diverged, weight):
    """`train/loss` contains the weights; the losses of objectives and of the untrained model do not."""
    untrained = {"step": 0, "valid/causal/loss": 6.2, "valid/masked_diffusion/loss": 6.3}
    last = {"step": 12, "train/loss": weight * max(losses.values())}
    last |= {f"train/{name}/loss": loss for name, loss in losses.items()}
    reason = _divergence([untrained, last])
    assert reason.startswith(f"diverged: the final training loss of {diverged} is" if diverged else "")
    assert bool(reason) == bool(diverged)


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ({"valid/ema/causal/loss": 2.5}, "2.500"),
        ({"valid/causal/loss": 3.0, "valid/ema/causal/loss": 2.5}, "3.000"),
        ({"valid/ema/causal/bits_per_byte": 2.5}, ""),
    ],
)
def test_the_status_shows_losses_of_averaged_weights_if_only_they_are_scored(sweep, scores, shown):
    sweep, cell = sweep
    with (sweep.path(cell) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, **scores}) + "\n")
    assert dict(zip(sweep.header(), sweep.row(cell), strict=True))["causal"] == shown
