"""The script that scores the released models, and recommendations from its sweep."""

import importlib.util
import json
import shutil

import pytest
from absl.testing import flagsaver

from dualsm.analysis.advice import advise
from dualsm.analysis.table import load
from dualsm.process.errors import UserError
from tests.analysis.synthetic import write_cell
from tests.commands import scope_of_flags
from tests.conftest import ROOT

NAMES = [f"alpha_{alpha:.3f}_n-reps={r}" for r in (1, 4, 16, 64) for alpha in (0, 1 / 16, 0.5, 63 / 64, 1)]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("released_models", ROOT / "launch" / "released_models.py")
    module = importlib.util.module_from_spec(spec)
    with scope_of_flags():
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize(
    ("branch", "alpha", "repetitions"),
    [
        ("alpha_0.750_n-reps=32", 3 / 4, 32),
        ("alpha_0.984_n-reps=1", 63 / 64, 1),
        ("alpha_0.004_n-reps=256", 1 / 256, 256),
        ("alpha_0.062_n-reps=8", 1 / 16, 8),
        ("alpha_0.938_n-reps=2", 15 / 16, 2),
        ("alpha_1.000_n-reps=128", 1, 128),
    ],
)
def test_names_of_branches_are_alpha_and_repetitions(script, branch, alpha, repetitions):
    assert script.cell_values(branch) == {"alpha": alpha, "repetitions": repetitions}


def test_alpha_outside_the_grid_is_rejected(script):
    with pytest.raises(UserError, match=r"no alpha of the grid is 0\.700"):
        script.cell_values("alpha_0.700_n-reps=1")


def test_recommendation_from_the_sweep(script, tmp_path, monkeypatch):
    """The commands are replaced by stubs that write the same files."""
    commands, models, sweep = [], tmp_path / "models", tmp_path / "sweep"
    for name in [*NAMES, "main"]:
        (models / name).mkdir(parents=True)

    def run(command):
        commands.append(command)
        workdir = next(part for part in command if part.startswith("--workdir=")).removeprefix("--workdir=")
        name = workdir.rpartition("/")[2]
        if command[0] == "dualsm.convert":
            values = script.cell_values(name)
            assert f"--weights={models / name}" in command
            assert "--config.objectives.causal.weight=2.0" in command
            assert (
                f"--config=dualsm:dual_470m:alpha={values['alpha']!r},repetitions={values['repetitions']}"
                in command
            )
            write_cell(tmp_path / "made", script.cell_values(name), name=name)
            made = tmp_path / "made" / "cells" / name
            (made / "cell.json").unlink()
            (made / "checkpoints").mkdir()
            shutil.move(made, workdir)
        else:
            assert {"--tasks=blimp", "--modes=causal,prefix,masked"} <= set(command)
            if len(commands) == 4:
                raise UserError("stopped")

    def interrupt(path, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "run", run)
    script.flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver((script._SWEEP, str(sweep)), (script._MODELS, str(models)),
                             (script._TASKS, "blimp")):  # fmt: skip
        with pytest.raises(UserError, match="stopped"):
            script.main([])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(script.shutil, "rmtree", interrupt)
            script.main([])
        script.main([])
        with flagsaver.flagsaver((script._LIMIT, 3)), pytest.raises(UserError, match="was made with"):
            script.main([])
    assert len(commands) == 2 * len(NAMES) + 1  # the cell that was stopped is not imported again
    assert not list(sweep.rglob("checkpoints"))
    table = load(sweep / "table.csv")
    assert (table["status"] == "done").all()
    assert len(table) == len(NAMES)
    assert advise(16, sweep / "table.csv", "task/mean/causal")[0].source == "surface"
    assert json.loads((sweep / "sweep.json").read_text())["cells"].keys() == set(NAMES)


def test_folder_without_branches_is_rejected(script, tmp_path):
    with pytest.raises(UserError, match="has no branch alpha_ALPHA_n-reps=R"):
        script.branches(str(tmp_path))
