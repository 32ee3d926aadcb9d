"""Notebooks run from top to bottom with smaller settings, and are committed with their outputs."""

import glob
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest

from dualsm.analysis.advice import advise, round_repetitions
from dualsm.analysis.advice_text import describe
from dualsm.analysis.confirmed import answer
from dualsm.exchange.weight_files import write_safetensors
from tests.conftest import ROOT, command_env
from tests.exchange.conftest import make_tokenizer_json
from tests.exchange.test_families import content

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def write_checkpoint(folder: Path, documents: list[str]) -> Path:
    """Writes a Llama with random weights as transformers does."""
    config = content("llama")
    d_model, d_ff, vocab_size = (config[f"{key}_size"] for key in ("hidden", "intermediate", "vocab"))
    d_kv = d_model * config["num_key_value_heads"] // config["num_attention_heads"]
    layer = {
        "self_attn.q_proj": (d_model, d_model), "self_attn.o_proj": (d_model, d_model),
        "self_attn.k_proj": (d_kv, d_model), "self_attn.v_proj": (d_kv, d_model),
        "mlp.gate_proj": (d_ff, d_model), "mlp.up_proj": (d_ff, d_model), "mlp.down_proj": (d_model, d_ff),
        "input_layernorm": (d_model,), "post_attention_layernorm": (d_model,),
    }  # fmt: skip
    layers = range(config["num_hidden_layers"])
    shapes = {f"model.layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}
    shapes |= {"model.embed_tokens": (vocab_size, d_model), "model.norm": (d_model,)}
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": rng.normal(1 if len(shape) == 1 else 0, 0.05, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(make_tokenizer_json(documents[:200]))
    return folder


@pytest.fixture(scope="module")
def settings(jsonl, documents, tmp_path_factory) -> dict[str, str]:
    """Returns notebook -> replacement of its settings cell."""
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
        "04_adapt": common("c")
        + f"WEIGHTS, STEPS = {str(write_checkpoint(folder / 'llama', documents))!r}, 8\n",
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
    assert shown.startswith("[CpuDevice(id=0)]\n")


def first_cell(path: Path) -> str:
    return next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")


def test_notebooks_start_with_the_same_cell():
    assert len({first_cell(path) for path in NOTEBOOKS}) == 1


@pytest.mark.skipif(
    bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")),
    reason="the cell finds this machine's TPU",
)
@pytest.mark.parametrize(
    ("driver", "plugin", "repository", "installed"),
    [
        ("", "", "", f"{ROOT}[notebooks]"),
        ("NVIDIA-SMI has failed", "", "", f"{ROOT}[notebooks]"),
        ("535.104.05", "", "", f"{ROOT}[notebooks,cuda12]"),
        ("580.65.06", "", "", f"{ROOT}[notebooks,cuda]"),
        ("580.65.06", "jax-cuda12-plugin", "", f"{ROOT}[notebooks,cuda12]"),
        ("580.65.06", "", "git+https://example.org/dualsm", "dualsm[notebooks,cuda] @ git+https://example.org/dualsm"),
    ],
)  # fmt: skip
def test_first_cell_installs_the_extra_of_the_accelerator(driver, plugin, repository, installed, tmp_path):
    """Runs in a Python without site-packages. pip, JAX and nvidia-smi are stubs, because a test cannot
    download packages or choose its GPU."""
    (tmp_path / "pip.py").write_text("import sys; open(__file__ + '.installed', 'w').write(sys.argv[-1])")
    (tmp_path / "jax.py").write_text("devices = lambda: ['the device']")
    if plugin:
        (tmp_path / f"{plugin.replace('-', '_')}-0.7.dist-info").mkdir()
        (tmp_path / f"{plugin.replace('-', '_')}-0.7.dist-info" / "METADATA").write_text(f"Name: {plugin}\n")
    if driver:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{driver}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    cell = first_cell(NOTEBOOKS[0]).replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
    process = subprocess.run(
        [sys.executable, "-S", "-c", cell], cwd=ROOT / "notebooks", capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:/bin"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "pip.py.installed").read_text() == installed
    assert process.stdout == "['the device']\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path: Path):
    notebook = nbformat.read(path, as_version=4)
    assert outputs(notebook, "image/png"), f"run {path.name} and commit its outputs"
    ran = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert ran == list(range(1, len(ran) + 1)), f"{path.name} was not run from top to bottom"
    assert str(ROOT) not in path.read_text(), "a path of one machine"
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not any("\r" in text or re.search(r"\b\d?\d%\|", text) for text in texts), (
        "a bar before its last state"
    )


def test_the_stored_recommendation_is_that_of_the_shipped_tables():
    notebook = nbformat.read(ROOT / "notebooks" / "03_repetition.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "confirmed=answer(question)" in cell.source]
    question = round_repetitions(unique=250e6, budget=32e9)
    text = describe(question, advise(question.repetitions), sweep="", confirmed=answer(question))
    assert cell.outputs[0].text == text + "\n"
