"""The notebooks run from top to bottom in a smaller setting, and are committed with their plots."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.conftest import ROOT, command_env

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def settings(jsonl, documents, tmp_path_factory) -> dict[str, str]:
    """For each notebook, what its cell of settings is replaced with."""
    folder = tmp_path_factory.mktemp("notebooks")
    text = folder / "text.jsonl"
    lines = jsonl.read_text().splitlines(keepends=True)
    text.write_text("".join(lines) + "".join(json.dumps({"text": d + " "}) + "\n" for d in documents))

    def common(name: str) -> str:
        return f"TEXT = {str(text)!r}\nFOLDER = {str(folder / name)!r}\n"

    return {
        "01_train": common("a") + "STEPS = 8\nMIXTURE = {'causal': 0.5, 'masked_diffusion': 0.5}\n",
        "02_objectives": "TEXTS = ['a b c a b c', 'b a']\n",
        "03_repetition": common("b") + "REPETITIONS, ALPHAS, STEPS = '1,8', '0,1', 8\n",
    }


def outputs(notebook, kind: str) -> list:
    return [
        output["data"][kind]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if kind in output.get("data", {})
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", command_env()["PYTHONPATH"])
    monkeypatch.setenv("XLA_FLAGS", command_env(devices=1)["XLA_FLAGS"])
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    names = {line.split("=")[0].strip() for line in parameters.source.splitlines() if "=" in line}
    assert all(name in settings[path.stem] or name == "MIXTURE" for name in names), "settings cannot be set"
    parameters.source = settings[path.stem]
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert outputs(notebook, "image/png"), "no plot was drawn"
    shown = "\n".join(o.text for cell in notebook.cells for o in cell.get("outputs", ()) if "text" in o)
    assert "error:" not in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path: Path):
    notebook = nbformat.read(path, as_version=4)
    assert outputs(notebook, "image/png"), f"run {path.name} and commit its outputs"
    ran = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert ran == list(range(1, len(ran) + 1)), f"{path.name} was not run from top to bottom"
    assert str(ROOT) not in path.read_text(), "a path of one machine"
