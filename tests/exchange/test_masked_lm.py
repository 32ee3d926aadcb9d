"""An exported run as a masked language model of transformers."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.exchange.export_huggingface import export
from dualsm.exchange.imported_run import write_run
from dualsm.model.transformer import init_params
from dualsm.rundir.trained_run import open_run
from tests.conftest import ROOT
from tests.micro import micro_config

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(ROOT / ".pytest_cache" / "hf_modules")}
torch = pytest.importorskip("torch", reason="torch is not installed (extra test-hf)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra test-hf)")

pytestmark = pytest.mark.extras

LENGTH = 12


@pytest.fixture(scope="module")
def exported(corpus_path, tmp_path_factory):
    """A run whose mask and padding are never predicted, and the folder that it was exported to."""
    folder = tmp_path_factory.mktemp("masked")
    tokenizer = load_tokenizer(str(corpus_path / "tokenizer.model"))
    config = micro_config()
    config.mesh.data = -1
    config.model.vocab_size, config.model.never_predicted = tokenizer.vocab_size, "0,4"
    params = init_params(config.model, jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = tree.unflatten(
        [p + 0.3 * jax.random.normal(key, p.shape) for p, key in zip(leaves, keys, strict=True)]
    )
    write_run(config, params, tokenizer, folder / "run", {"format": "test", "weights": "w", "sha256": "0"})
    run = open_run(folder / "run")
    export(run, folder / "out")
    return run, folder / "out"


def open_masked(folder, **settings):
    model, problems = transformers.AutoModelForMaskedLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **settings
    )
    assert not any(problems.values()), problems
    return model.eval()


def masked_text(run, rows: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Texts with masks, and labels: the original tokens there, -100 elsewhere; rows have unequal numbers."""
    rng = np.random.default_rng(0)
    tokens_BxL = rng.integers(16, run.tokenizer.vocab_size, (rows, LENGTH))
    tokens_BxL[:, 0] = run.tokenizer.special.bos
    masked_BxL = np.zeros_like(tokens_BxL, bool)
    for row in range(rows):
        masked_BxL[row, 1 + row :: 2 + row] = True
    labels_BxL = np.where(masked_BxL, tokens_BxL, -100)
    return np.where(masked_BxL, run.tokenizer.special.mask, tokens_BxL), labels_BxL


def our_logits(run, tokens_BxL) -> np.ndarray:
    """Logits at position i for token i + 1, with attention in both directions."""
    zeros_BxL = jnp.zeros(tokens_BxL.shape, jnp.int32)
    logits = run.model().logits(jnp.asarray(tokens_BxL, jnp.int32), zeros_BxL, zeros_BxL + LENGTH)
    return np.maximum(np.asarray(logits), np.finfo(np.float32).min)


def test_logits_predict_their_own_position(exported):
    run, folder = exported
    tokens_BxL, _ = masked_text(run)
    with torch.no_grad():
        found = open_masked(folder)(torch.tensor(tokens_BxL)).logits
    expected = our_logits(run, tokens_BxL)
    probabilities = jax.nn.softmax(expected)
    np.testing.assert_allclose(torch.softmax(found[:, 1:], -1), probabilities[:, :-1], atol=1e-5)
    first = torch.softmax(found[:, 0], -1).numpy()
    assert (first[:, [0, 4]] == 0).all()
    assert np.ptp(np.delete(first, [0, 4], axis=1)) == 0


@pytest.mark.parametrize("shifted", [False, True])
def test_last_logits_are_the_last_of_all(exported, shifted):
    run, folder = exported
    tokens_BxL = torch.tensor(masked_text(run)[0])
    model = open_masked(folder, masked_lm_shifted=shifted)
    with torch.no_grad():
        assert torch.equal(model(tokens_BxL, logits_to_keep=3).logits, model(tokens_BxL).logits[:, -3:])


def test_logits_predict_the_next_position_if_shifted(exported):
    run, folder = exported
    tokens_BxL, _ = masked_text(run)
    with torch.no_grad():
        found = open_masked(folder, masked_lm_shifted=True)(torch.tensor(tokens_BxL)).logits
    np.testing.assert_allclose(
        torch.softmax(found, -1), jax.nn.softmax(our_logits(run, tokens_BxL)), atol=1e-5
    )


@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_is_that_of_masked_tokens(exported, shifted):
    run, folder = exported
    tokens_BxL, labels_BxL = masked_text(run)
    with torch.no_grad():
        output = open_masked(folder, masked_lm_shifted=shifted)(
            torch.tensor(tokens_BxL), labels=torch.tensor(labels_BxL)
        )
    log_p = jax.nn.log_softmax(our_logits(run, tokens_BxL))
    rows, positions = np.nonzero(labels_BxL >= 0)
    expected = -log_p[rows, positions - 1, labels_BxL[rows, positions]].mean()
    assert output.loss.item() == pytest.approx(float(expected), rel=1e-4)


def test_the_folder_still_is_a_causal_model(exported):
    run, folder = exported
    tokens_BxL, _ = masked_text(run)
    causal = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    masked = open_masked(folder)
    for name, tensor in causal.state_dict().items():
        assert torch.equal(tensor, masked.state_dict()[name])
    with torch.no_grad():
        same = causal(torch.tensor(tokens_BxL), mode="masked").logits[:, :-1]
        assert torch.equal(masked(torch.tensor(tokens_BxL)).logits[:, 1:], same)
    with pytest.raises(ValueError, match="load the folder with AutoModelForCausalLM"):
        masked.generate(torch.tensor(tokens_BxL))


def test_padding_changes_nothing(exported):
    run, folder = exported
    tokens_BxL, _ = masked_text(run)
    model, pad = open_masked(folder), run.tokenizer.special.pad
    padding = torch.full((len(tokens_BxL), 3), pad)
    ids, seen = torch.tensor(tokens_BxL), torch.ones(len(tokens_BxL), LENGTH, dtype=torch.long)
    with torch.no_grad():
        expected = model(ids).logits[:, 1:]
        right = model(torch.cat([ids, padding], 1), torch.cat([seen, 0 * padding], 1)).logits[:, 1:LENGTH]
        left = model(torch.cat([padding, ids], 1), torch.cat([0 * padding, seen], 1)).logits[:, 4:]
    for found in (right, left):
        torch.testing.assert_close(torch.softmax(found, -1), torch.softmax(expected, -1), atol=1e-5, rtol=0)


def test_pipelines_fill_masks(exported):
    run, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = open_masked(folder)
    fill = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    found = fill("def <mask>(self)", tokenizer_kwargs={"split_special_tokens": False}, top_k=2)
    ids = tokenizer("def <mask>(self)", split_special_tokens=False, return_tensors="pt")["input_ids"]
    position = (ids[0] == tokenizer.mask_token_id).nonzero().item()
    with torch.no_grad():
        best = model(ids).logits[0, position].topk(2).indices.tolist()
    assert [entry["token"] for entry in found] == best


@pytest.mark.parametrize("batches", [2])
def test_trainer_accumulates_the_gradient_of_one_large_batch(exported, batches, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate (extra test-hf)")
    from tests.exchange.trainer import check_accumulation

    run, folder = exported
    tokens_BxL, labels_BxL = masked_text(run, rows=4)
    rows = [
        {"input_ids": torch.tensor(i), "labels": torch.tensor(label)}
        for i, label in zip(tokens_BxL, labels_BxL, strict=True)
    ]
    check_accumulation(open_masked(folder), rows, batches, tmp_path)
