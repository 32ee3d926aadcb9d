"""Import and export of models without a mask, with and without training in between."""

import dataclasses
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.exchange import average_checkpoints
from dualsm.exchange.export_huggingface import export
from dualsm.exchange.import_huggingface import load
from dualsm.exchange.tokenizer_export import exported_tokenizer
from dualsm.exchange.weights_source import read_source
from dualsm.model.transformer import MASKED
from dualsm.rundir.trained_run import open_run
from tests.conftest import ROOT
from tests.exchange.conftest import VOCABULARY, make_tokenizer_json, read_all

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(ROOT / ".pytest_cache" / "hf_modules")}
torch = pytest.importorskip("torch", reason="torch is not installed (extra test-hf)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra test-hf)")

pytestmark = pytest.mark.extras

CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPARE = {"grown": 0, "spare": 5}


@pytest.fixture(scope="module", params=SPARE)
def imported(request, documents, tmp_path_factory):
    """Returns a model of transformers without a mask, with a number of spare rows, and its run."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY + SPARE[request.param], hidden_size=32, intermediate_size=48,
            num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.3, tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.json").write_text(make_tokenizer_json(documents[:100], CHAT))
    message = load(folder / "model", "", None, folder / "run")
    return model, folder, open_run(folder / "run"), message


def test_import_reports_the_special_tokens(imported):
    model, _, _, message = imported
    spare = model.config.vocab_size - VOCABULARY
    how = "takes the unused id" if spare else "is added with the id"
    assert f"mask: <mask> {how} {VOCABULARY}" in message
    assert "bos: <|im_start|> (id 1)" in message
    assert (f"{spare} ids of the weights have no token" in message) == bool(spare)


def test_logits_of_text_are_those_of_transformers(imported):
    model, _, run, _ = imported
    external_ids_V = run.tokenizer.external_ids_V
    text = np.flatnonzero((external_ids_V >= 3) & (external_ids_V < VOCABULARY))
    tokens_BxL = np.random.default_rng(0).choice(text, (2, 12))
    tokens_BxL[:, 0] = run.tokenizer.special.bos
    with torch.no_grad():
        expected = model(torch.tensor(external_ids_V[tokens_BxL]).long()).logits.numpy()
    zeros_BxL = jnp.zeros((2, 12), jnp.int32)
    logits = run.model().logits(jnp.asarray(tokens_BxL, jnp.int32), zeros_BxL, zeros_BxL + jnp.arange(1, 13))
    predicted = [*text, run.tokenizer.special.bos, run.tokenizer.special.eos]
    np.testing.assert_allclose(logits[..., predicted], expected[..., external_ids_V[predicted]], atol=1e-4)
    unnamed = int(np.flatnonzero(external_ids_V == 0)[0])  # <|endoftext|>, a special token of the model
    others = sorted(set(range(run.tokenizer.vocab_size)) - {*predicted, unnamed})
    assert (np.asarray(logits)[..., run.tokenizer.special.mask] == np.float32(MASKED)).all()
    assert (np.asarray(logits)[..., others] == np.float32(MASKED)).all()


def test_export_of_an_untrained_run_equals_the_import(imported, tmp_path):
    _, folder, run, _ = imported
    export(run, tmp_path / "out")
    before, after = (read_all(path / "model.safetensors") for path in (folder / "model", tmp_path / "out"))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a")["input_ids"][0] == 1
    assert len(tokenizer) <= config.vocab_size


def test_mean_of_trained_checkpoints_keeps_its_mask_and_origin(imported, tmp_path):
    """A mean of checkpoints is at step 0, as an import is; that of step 0 alone is untrained."""
    _, _, run, _ = imported
    average_checkpoints.write(run.workdir, [0], 0, tmp_path / "mean")
    mean = open_run(tmp_path / "mean")
    assert exported_tokenizer(mean) is not mean.tokenizer
    source = read_source(mean)
    for key in ("model_type", "max_position_embeddings"):
        assert source[key] == read_source(run)[key]
    (tmp_path / "mean" / "source.json").write_text(json.dumps(source | {"steps": [0, 4]}))
    assert exported_tokenizer(mean) is mean.tokenizer


def test_export_of_a_trained_run_has_its_mask(imported, tmp_path):
    _, _, run, _ = imported
    export(dataclasses.replace(run, step=1), tmp_path / "out", own_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.mask_token_id == tokenizer.mask_token_id == VOCABULARY
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size >= VOCABULARY + 1
    with torch.no_grad():
        logits = model(torch.tensor([[1, VOCABULARY, 9]]), mode="masked").logits
    masked = list(range(VOCABULARY, model.config.vocab_size))
    assert torch.softmax(logits, -1)[..., masked].max() == 0
    assert torch.softmax(logits, -1)[..., :VOCABULARY].sum(-1).allclose(torch.ones(1, 3))
