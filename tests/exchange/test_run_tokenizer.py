"""The tokenizer file of a run: its export in the reference format, and a file of another tokenizer."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers

from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.data.tokenizer_json import JsonTokenizer
from dualsm.exchange.export_reference import export
from dualsm.exchange.imported_run import write_run
from dualsm.exchange.special_tokens import adapt_tokenizer
from dualsm.model.transformer import init_params
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import open_run
from tests.exchange.conftest import VOCABULARY, make_tokenizer_json, read_all
from tests.micro import micro_config

EMBEDDING = "embedding.word_embedding.weight"


def make_run(tokenizer, folder):
    """Writes and opens a run with the paper's head at step 0."""
    config = micro_config()
    config.model.vocab_size = tokenizer.vocab_size
    params = init_params(config.model, jax.random.key(0))
    write_run(config, params, tokenizer, folder, {"format": "test", "weights": "w", "sha256": "0"})
    return open_run(folder)


@pytest.fixture(scope="module")
def adapted(documents, tmp_path_factory):
    """Returns a run whose tokenizer got the token `<mask>` in an import."""
    folder = tmp_path_factory.mktemp("adapted")
    chat = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    (folder / "tokenizer.json").write_text(make_tokenizer_json(documents[:100], chat))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    tokenizer, _ = adapt_tokenizer(folder, folder / "tokenizer.json", VOCABULARY)
    assert tokenizer.num_ids == VOCABULARY
    return make_run(tokenizer, folder / "run")


@pytest.mark.parametrize("step", [0, 12])
def test_reference_export_of_an_adapted_tokenizer(adapted, tmp_path, step):
    """The exported file is a standard one, and has the added token if the run was trained."""
    export(dataclasses.replace(adapted, step=step), tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    rows = VOCABULARY + (step > 0)
    assert theirs.get_vocab_size() == rows
    assert theirs.token_to_id("<mask>") == (VOCABULARY if step else None)
    embedding = read_all(tmp_path / "out" / "model.safetensors")[EMBEDDING]
    assert len(embedding) == rows
    if step:
        mask = np.asarray(adapted.params["embedding"]["embedding"])[adapted.tokenizer.special.mask]
        np.testing.assert_array_equal(embedding[VOCABULARY], mask)
    text = "def main(a, b):\n    return a"
    tokens = theirs.encode(text, add_special_tokens=False).ids
    assert tokens == adapted.tokenizer.external_ids_V[adapted.tokenizer.encode([text])[0]].tolist()
    assert theirs.encode(text).ids == [1, *tokens]  # a document begins with BOS


def test_reference_export_has_a_token_for_every_row(documents, tmp_path):
    """Special tokens that a file lacks are added when it is loaded."""
    model = make_tokenizer_json(documents[:50], ["<mask>", "<s>"])
    export(make_run(JsonTokenizer(model.encode()), tmp_path / "run"), tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert theirs.get_vocab_size() == VOCABULARY + 3
    assert theirs.token_to_id("</s>") >= VOCABULARY


def test_reference_export_keeps_a_complete_file(tokenizer_json, tmp_path):
    export(make_run(JsonTokenizer(tokenizer_json.encode()), tmp_path / "run"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == tokenizer_json


@pytest.mark.parametrize(("own", "other"), [(0, 1), (1, 0)])
def test_a_tokenizer_of_another_size_is_an_error(tokenizer_json, corpus_path, tmp_path, own, other):
    models = tokenizer_json.encode(), (corpus_path / "tokenizer.model").read_bytes()
    files = tmp_path / "0", tmp_path / "1"
    for path, model in zip(files, models, strict=True):
        path.write_bytes(model)
    sizes = [load_tokenizer(path).vocab_size for path in files]
    run = make_run(load_tokenizer(files[own]), tmp_path / "run")
    assert run.config.model.vocab_size == run.tokenizer.vocab_size == sizes[own]
    shutil.copy(files[other], run.workdir / "tokenizer.model")
    with pytest.raises(
        UserError, match=rf"tokenizer.model has {sizes[other]} ids but the model of the run has {sizes[own]};"
    ):
        open_run(run.workdir)
