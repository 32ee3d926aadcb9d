"""Export of architectures that no stock class supports, with their own code, in all modes."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import freeze
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.exchange import export_reference
from dualsm.exchange.export_huggingface import export
from dualsm.exchange.imported_run import write_run
from dualsm.exchange.token_ids import to_external
from dualsm.generation.autoregressive import generate
from dualsm.generation.sampling_params import SamplingParams
from dualsm.model.transformer import init_params
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import open_run
from tests.conftest import ROOT
from tests.exchange.conftest import to_internal
from tests.micro import micro_config

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(ROOT / ".pytest_cache" / "hf_modules")}
torch = pytest.importorskip("torch", reason="torch is not installed (extra test-hf)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra test-hf)")

pytestmark = pytest.mark.extras

LENGTH = 16
SCALING = {
    "rope_theta": 100.0, "rope_scaling.name": "llama3", "rope_scaling.factor": 4.0,
    "rope_scaling.original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "projections normalized, outputs normalized, tied": {
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "qk_norm": "projection", "norm_placement": "post",
        "tie_word_embeddings": True, "no_rope_layer_interval": 2, **SCALING,
    },
    "heads normalized, biases, plain": {
        "num_heads": 4, "num_kv_heads": 1, "qk_norm": "head", "qkv_bias": True, "head": "plain",
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def exported(request, tokenizer_json, tmp_path_factory):
    """Returns a run with random weights, and the exported model."""
    folder = tmp_path_factory.mktemp("switches")
    (folder / "tokenizer.json").write_text(tokenizer_json)
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    config = micro_config()
    config.model.vocab_size, config.model.norm_eps = tokenizer.vocab_size, 1e-3
    config.model.update_from_flattened_dict(CASES[request.param])
    leaves, tree = jax.tree.flatten(init_params(config.model, jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = tree.unflatten(
        [p + 0.2 * jax.random.normal(key, p.shape) for p, key in zip(leaves, keys, strict=True)]
    )
    external = to_external(params, tokenizer.external_ids_V)
    params = to_internal(external, tokenizer.external_ids_V)
    write_run(config, params, tokenizer, folder / "run", {"format": "test", "weights": "w", "sha256": "0"})
    run = open_run(folder / "run")
    export(run, folder / "out")
    model, problems = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(problems.values()), problems
    return run, model.eval(), folder / "out"


def text_ids(run) -> np.ndarray:
    known = np.flatnonzero(run.tokenizer.external_ids_V >= 0)
    return np.random.default_rng(0).choice(known[known >= 16], (2, LENGTH)).astype(np.int32)


def test_logits_are_equal_in_both_directions(exported):
    run, model, _ = exported
    ids_BxL, external_ids_V = text_ids(run), run.tokenizer.external_ids_V
    known_V = (external_ids_V >= 0) & (np.arange(len(external_ids_V)) >= 16)
    for mode, end_L in (("causal", jnp.arange(1, LENGTH + 1)), ("masked", jnp.full(LENGTH, LENGTH))):
        end_BxL = jnp.broadcast_to(end_L, ids_BxL.shape)
        ours = run.model().logits(jnp.asarray(ids_BxL), jnp.zeros_like(end_BxL), end_BxL)
        with torch.no_grad():
            theirs = model(torch.tensor(external_ids_V[ids_BxL]).long(), mode=mode).logits.numpy()
        np.testing.assert_allclose(
            np.asarray(ours)[..., known_V], theirs[..., external_ids_V[known_V]], atol=1e-4, rtol=0
        )


def test_greedy_decoding_is_equal(exported):
    run, model, _ = exported
    prompt, external_ids_V = text_ids(run)[0, :6].tolist(), run.tokenizer.external_ids_V
    greedy, special = SamplingParams(temperature=0), run.tokenizer.special
    *_, (text,) = generate(freeze(run.config.model), run.params, [prompt], 10, greedy, special)
    found = model.generate(torch.tensor([external_ids_V[prompt]]).long(), max_new_tokens=10, do_sample=False)
    assert found[0].tolist() == external_ids_V[text].tolist()


def test_tied_weights_stay_tied(exported, tmp_path):
    run, model, folder = exported
    shared = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert shared == run.config.model.tie_word_embeddings
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_reference_format_rejects_switches(exported, tmp_path):
    run, _, _ = exported
    is_plain = run.config.model.head == "plain"
    rejected = "the plain head" if is_plain else r"config\.model\.num_kv_heads"
    with pytest.raises(UserError, match=f"does not support {rejected}"):
        export_reference.export(run, tmp_path / "out")
