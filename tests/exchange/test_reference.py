"""Import and export of the paper's released weights, with any order of token ids."""

import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.data.build import Recipe, build
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.evaluation.held_out import evaluate_held_out, open_held_out
from dualsm.exchange import reference_format
from dualsm.exchange.import_reference import load
from dualsm.exchange.imported_run import fit_config
from dualsm.exchange.weight_files import open_weights, write_safetensors
from dualsm.objectives.example import document_spans
from dualsm.process.errors import UserError
from dualsm.rundir.metrics import read_metrics
from dualsm.rundir.trained_run import open_run
from dualsm.training.loop import train
from tests.conftest import run_command
from tests.exchange.conftest import FIXTURE, VOCABULARY, read_all, to_internal
from tests.micro import micro_config
from tests.test_commands import assert_one_line

pytestmark = pytest.mark.slow

SHAPE = {"num_layers": 2, "d_model": 64, "num_heads": 4, "d_ff": 172}


def weights() -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in read_all(FIXTURE).items() if name.startswith("param.")}


@pytest.fixture(scope="module")
def bare(released, tmp_path_factory):
    """Returns a folder as in a release: without inputs, logits and name prefix of the fixture."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(released / "tokenizer.json", folder)
    tensors = {name.removeprefix("param."): tensor for name, tensor in weights().items()}
    write_safetensors(folder / "model.safetensors", tensors, open_weights(FIXTURE).metadata)
    return folder


@pytest.fixture(scope="module")
def imported(bare, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("imported") / "run"
    process = run_command(
        "dualsm.convert", "import", "--format=reference", f"--weights={bare / 'model.safetensors'}",
        f"--workdir={workdir}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return workdir


@pytest.fixture(scope="module")
def corpus_of_its_own(jsonl, bare, tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "corpus"
    recipe = Recipe(input=str(jsonl), tokenizer=str(bare / "tokenizer.json"), valid_fraction=0.05)
    build(recipe, str(path), workers=1, quiet=True)
    return path


@pytest.mark.parametrize("view", ["causal", "bidirectional"])
def test_imported_run_has_the_logits_of_the_reference(imported, view):
    run = open_run(imported)
    tensors = read_all(FIXTURE)
    external_ids_V = run.tokenizer.external_ids_V
    ours = np.zeros(VOCABULARY, np.int32)
    ours[external_ids_V[external_ids_V >= 0]] = np.flatnonzero(external_ids_V >= 0)
    tokens_BxL = jnp.asarray(ours[tensors["input_ids"]])
    start_BxL, end_BxL = jax.vmap(document_spans)(jnp.asarray(tensors["doc_ids"], jnp.int32))
    if view == "causal":
        end_BxL = jnp.broadcast_to(jnp.arange(1, tokens_BxL.shape[1] + 1), tokens_BxL.shape)
    logits_BxLxV = np.asarray(run.model().logits(tokens_BxL, start_BxL, end_BxL))
    np.testing.assert_allclose(logits_BxLxV[..., ours], tensors[f"logits_{view}"], atol=1e-4, rtol=0)
    # Ids that the weights do not have get negligible probability.
    assert logits_BxLxV[..., external_ids_V < 0].max() < logits_BxLxV[..., external_ids_V >= 0].min() - 10


def test_imported_run_samples(imported):
    process = run_command("dualsm.sample", f"--workdir={imported}", "--prompt=def main(", "--tokens=4")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("def main(")


def recipe_for(corpus_path):
    """Returns a config with the fixture's shape and a tiny learning rate."""
    config = micro_config(corpus_path)
    for key, value in SHAPE.items():
        config.model[key] = value
    config.mixture.causal, config.mixture.prefix, config.mixture.masked_diffusion = 1.0, 0.0, 0.0
    config.valid.objectives = "causal"
    config.optimizer.learning_rate, config.optimizer.weight_decay = 1e-9, 0.0
    config.mesh.data = -1
    return config


def test_imported_run_trains_with_its_config(bare, corpus_of_its_own, tmp_path):
    config, workdir = recipe_for(corpus_of_its_own), tmp_path / "run"
    load(bare / "model.safetensors", "", config, workdir)
    before = open_run(workdir)
    assert train(config, workdir)
    after = open_run(workdir)
    assert (before.step, after.step) == (0, config.steps)
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), before.params, after.params))
    assert 0 < max(moved) < 1e-6
    losses = [
        record["valid/causal/loss"] for record in read_metrics(workdir) if "valid/causal/loss" in record
    ]
    assert losses[0] == pytest.approx(losses[-1], abs=1e-4)
    held_out = open_held_out(after, str(corpus_of_its_own))
    scores = dict(evaluate_held_out(after, held_out, ["causal"], samples=1))
    assert scores["causal"]["nats_per_token"] == pytest.approx(losses[-1], rel=0.05)  # evaluates more rows
    assert scores["causal"]["bytes_of"] == "documents"


def test_imported_weights_can_be_trained_with_any_optimizer(bare, corpus_of_its_own, tmp_path):
    """A fork and a run in the imported run's directory are identical."""
    config = recipe_for(corpus_of_its_own)
    config.steps, config.optimizer.learning_rate = 2, 1e-3
    load(bare / "model.safetensors", "", None, tmp_path / "imported")
    before = open_run(tmp_path / "imported").params
    config.optimizer.name, config.start.run = "adamw", str(tmp_path / "imported")
    assert train(config, tmp_path / "fork")
    config.start.run = ""
    with pytest.raises(UserError, match="imported weights with another config .* with --config.start.run="):
        train(config, tmp_path / "imported")
    load(bare / "model.safetensors", "", config, tmp_path / "own")
    assert train(config, tmp_path / "own")
    fork, own = (open_run(tmp_path / name) for name in ("fork", "own"))
    assert fork.step == own.step == 2
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), fork.params, own.params)))
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), before, own.params))
    assert 0 < max(moved) < 0.01  # with AdamW at most about the learning rate per step


def test_bytes_summed_over_tokens_are_reported(bare, corpus_of_its_own, tmp_path, capsys):
    """With a corpus of an earlier version."""
    older, workdir = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(corpus_of_its_own, older)
    manifest = json.loads((older / "manifest.json").read_text())
    for key in ("document_bytes", "document_bytes_sha256"):
        del manifest["splits"]["valid"][key]
    (older / "manifest.json").write_text(json.dumps(manifest))
    config = recipe_for(older)
    load(bare / "model.safetensors", "", config, workdir)
    assert train(config, workdir)
    assert "bits per byte use the bytes of the tokens" in capsys.readouterr().err
    run = open_run(workdir)
    scores = dict(evaluate_held_out(run, open_held_out(run, str(older)), ["causal"], samples=1))
    assert scores["causal"]["bytes_of"] == "tokens"


def test_export_of_an_imported_run_equals_the_import(imported, bare, tmp_path):
    process = run_command(
        "dualsm.convert", "export", "--format=reference", f"--workdir={imported}",
        f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    before, after = (read_all(folder / "model.safetensors") for folder in (bare, tmp_path / "out"))
    metadata, told = (
        open_weights(folder / "model.safetensors").metadata for folder in (bare, tmp_path / "out")
    )
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    shared = metadata.keys() & told.keys()
    assert len(shared) == 7
    assert {key: float(told[key]) for key in shared} == {key: float(metadata[key]) for key in shared}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (bare / "tokenizer.json").read_bytes()


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def damaged_weights(case: str, folder) -> None:
    path = folder / "weights"
    if case == "pickle":
        path.write_bytes(pickle.dumps(Hostile(str(folder / "mark"))))
    elif case == "zip":
        path.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    elif case == "text":
        path.write_text("not weights at all")
    elif case == "cut":
        path.write_bytes(FIXTURE.read_bytes()[:100_000])
    elif case == "foreign":
        write_safetensors(path, {"transformer.wte.weight": np.zeros((4, 4))}, {})
    elif case == "missing":
        tensors = weights()
        del tensors["param.encoder.layers.1.mlp.down_proj.weight"]
        write_safetensors(path, tensors, {})
    elif case == "gap":
        tensors = {name.replace("layers.1.", "layers.999999999."): value for name, value in weights().items()}
        write_safetensors(path, tensors, {})
    elif case == "shape":
        tensors = weights() | {"param.classifier.projection.weight": np.zeros((64, 32))}
        write_safetensors(path, tensors, {"num_attention_heads": "4"})
    elif case == "no heads":
        write_safetensors(path, weights(), {})
    elif case == "too many heads":
        write_safetensors(path, weights(), {"num_attention_heads": "65"})
    elif case == "contradiction":
        write_safetensors(path, weights(), {"num_layers": "3", "num_attention_heads": "4"})


DAMAGED = {
    "pickle": "weights-only reader",
    "zip": "weights-only reader",
    "text": "neither safetensors nor",
    "cut": "damaged",
    "foreign": "missing tensors",
    "missing": "encoder.layers.1.mlp.down_proj.weight",
    "gap": "missing tensors: encoder.layers.1.",
    "shape": "the shape of param.classifier.projection.weight is",
    "no heads": "num_attention_heads",
    "too many heads": "num_attention_heads=65 must be an integer from 1 to 64",
    "contradiction": "num_layers",
    "gone": "cannot read",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_unsupported_weights_are_rejected(case, bare, tmp_path):
    damaged_weights(case, tmp_path)
    with pytest.raises(UserError, match=DAMAGED[case]):
        load(tmp_path / "weights", str(bare / "tokenizer.json"), None, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "mark").exists()  # nothing was unpickled


def test_pickle_is_rejected_in_one_line(tmp_path):
    damaged_weights("pickle", tmp_path)
    process = run_command(
        "dualsm.convert", "import", "--format=reference", f"--weights={tmp_path / 'weights'}",
        f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert_one_line(process, "weights-only reader")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "import, export"),
        (
            ["import", "--format=gguf", "--workdir=x"],
            "--format=gguf: import does not support it; choose huggingface or reference",
        ),
        (["import", "--format=huggingface", "--workdir=x"], "--weights is not set"),
        (
            ["import", "--format=huggingface", "--workdir=x", "--weights=nowhere"],
            "nowhere has no config.json",
        ),
        (["export", "--format=huggingface", "--workdir=x", "--output=y", "--dtype=int8"], "--dtype"),
        (["import", "export", "--format=reference", "--workdir=x"], "export"),
        (["export", "--format=reference", "--workdir=nowhere", "--output=x"], "nowhere"),
    ],
)
def test_invalid_command_lines_are_user_errors(arguments, expected):
    arguments = arguments or ["--format=reference", "--workdir=x"]
    assert_one_line(run_command("dualsm.convert", *arguments), expected)


def test_config_of_another_model_is_rejected(bare, tmp_path):
    config = recipe_for("")
    config.model.num_layers = 3
    with pytest.raises(UserError, match="config.model.num_layers=3 but the weights have 2"):
        load(bare / "model.safetensors", "", config, tmp_path / "run")


def test_corpus_of_another_tokenizer_is_rejected(bare, corpus_path):
    tokenizer = load_tokenizer(str(bare / "tokenizer.json"))
    with pytest.raises(UserError, match="not prepared with the tokenizer of the weights"):
        fit_config(recipe_for(corpus_path), SHAPE, tokenizer)


def test_tokenizer_with_more_text_ids_than_the_weights_is_rejected():
    embedding = weights()["param.embedding.word_embedding.weight"]
    with pytest.raises(UserError, match="321 ids but the weights have 320"):
        to_internal({"embedding": {"embedding": embedding}}, np.arange(321))


def test_config_provides_settings_that_the_weights_lack(bare):
    tokenizer = load_tokenizer(str(bare / "tokenizer.json"))
    tensors = open_weights(bare / "model.safetensors").tensors
    settings = reference_format.model_settings(*reference_format.parameter_sources(tensors)[:1], tensors, {})
    assert "num_heads" not in settings
    recipe = recipe_for("")
    recipe.model.rope_theta = 1234.0
    config = fit_config(recipe, settings, tokenizer)
    assert (config.model.num_heads, config.model.rope_theta) == (SHAPE["num_heads"], 1234.0)
    assert config.model.vocab_size == tokenizer.vocab_size
