"""Checkpoints of every family: equal logits and texts, exact export, and malformed folders."""

import json
import os
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import freeze
from dualsm.data.build import Recipe, build
from dualsm.exchange.export_huggingface import export
from dualsm.exchange.import_huggingface import load
from dualsm.exchange.sharded_files import write_shards
from dualsm.generation.autoregressive import generate
from dualsm.generation.sampling_params import SamplingParams
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import open_run
from dualsm.training.loop import train
from tests.conftest import ROOT, run_command
from tests.micro import micro_config

from .conftest import VOCABULARY, make_tokenizer_json

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(ROOT / ".pytest_cache" / "hf_modules")}
torch = pytest.importorskip("torch", reason="torch is not installed (extra test-hf)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra test-hf)")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.extras

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 100.0,
}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 1000.0}


def rope_keys(rope: dict) -> dict:
    """Returns RoPE settings as the installed version of transformers names them."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"rope_parameters": rope}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope is DEFAULT else scaling}


CASES = {
    "llama": ("Llama", rope_keys(LLAMA3) | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", rope_keys(DEFAULT) | {"head_dim": 12, "sliding_window": None}),
    "qwen2": ("Qwen2", rope_keys(DEFAULT) | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", rope_keys(DEFAULT) | {"head_dim": 16}),
    "olmo2": ("Olmo2", rope_keys(DEFAULT)),
    "smollm3": ("SmolLM3", rope_keys(DEFAULT) | {"no_rope_layer_interval": 2}),
}
LENGTH = 24


def make_model(name: str, **changes):
    """Returns a tiny model with random values of all parameters."""
    family, own = CASES[name]
    config = getattr(transformers, f"{family}Config")(**SHAPE | own | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=CASES)
def imported(request, tokenizer_json, tmp_path_factory):
    """Returns a model of transformers, its folder, and the imported run."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param)
    model.save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.json").write_text(tokenizer_json)
    load(folder / "model", "", None, folder / "run")
    return model, folder / "model", open_run(folder / "run")


def text_ids(run) -> np.ndarray:
    """Returns random internal ids of text, int32 [3, L]."""
    known = np.flatnonzero(run.tokenizer.external_ids_V >= 0)
    return np.random.default_rng(0).choice(known[known >= 16], (3, LENGTH)).astype(np.int32)


def our_logits(run, ids_BxL: np.ndarray) -> np.ndarray:
    """Returns the logits in the order of external ids."""
    ends_BxL = jnp.broadcast_to(jnp.arange(1, LENGTH + 1), ids_BxL.shape)
    logits = np.asarray(run.model().logits(jnp.asarray(ids_BxL), jnp.zeros_like(ends_BxL), ends_BxL))
    found = np.zeros((*ids_BxL.shape, VOCABULARY), np.float32)
    external_ids_V = run.tokenizer.external_ids_V
    found[..., external_ids_V[external_ids_V >= 0]] = logits[..., external_ids_V >= 0]
    return found


def external(run, ids) -> "torch.Tensor":
    return torch.tensor(run.tokenizer.external_ids_V[ids]).long()


def test_logits_equal_those_of_transformers(imported):
    model, _, run = imported
    ids_BxL = text_ids(run)
    with torch.no_grad():
        expected = model(external(run, ids_BxL)).logits.numpy()
    assert np.abs(expected).max() > 1
    special = run.tokenizer.external_ids_V[:16]
    text = np.setdiff1d(np.arange(VOCABULARY), special)
    np.testing.assert_allclose(our_logits(run, ids_BxL)[..., text], expected[..., text], atol=1e-4, rtol=0)


def test_greedy_decoding_equals_that_of_transformers(imported):
    model, _, run = imported
    special = run.tokenizer.special
    prompts = [row[: 5 + 3 * i].tolist() for i, row in enumerate(text_ids(run))]
    *_, texts = generate(
        freeze(run.config.model), run.params, prompts, 12, SamplingParams(temperature=0), special
    )
    external_ids_V = run.tokenizer.external_ids_V
    reserved = [int(i) for i in external_ids_V[:16] if i >= 0]
    suppressed = [i for i in reserved if i != external_ids_V[special.eos]]
    different = 0
    for prompt, text in zip(prompts, texts, strict=True):
        found = model.generate(
            external(run, [prompt]), max_new_tokens=12, do_sample=False, suppress_tokens=suppressed,
            eos_token_id=int(external_ids_V[special.eos]), pad_token_id=0,
        )[0].tolist()  # fmt: skip
        assert external_ids_V[text].tolist() == found
        different = max(different, len(set(text[len(prompt) :])))
    assert different > 2


def tensors_of(folder) -> dict:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors_torch.load_file(path)
    return found


def test_export_of_an_imported_run_has_equal_tensors(imported, tmp_path):
    model, folder, run = imported
    export(run, tmp_path / "out")
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) != run.config.model.tie_word_embeddings
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    again, problems = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(problems.values()), problems
    assert type(again) is type(model)
    ids = external(run, text_ids(run))
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert again.config.max_position_embeddings == SHAPE["max_position_embeddings"]
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == SHAPE["max_position_embeddings"]


def test_bfloat16_shards_round_trip_bit_for_bit(tokenizer_json, tmp_path):
    model = make_model("llama").bfloat16()
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer_json)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    load(tmp_path / "model", "", None, tmp_path / "run")
    export(open_run(tmp_path / "run"), tmp_path / "out", "bfloat16", max_shard_bytes=10_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert len(files) > 2
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    assert before.keys() == after.keys() == index["weight_map"].keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(tensor, after[name]), name
    expected, again = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        for name in ("model", "out")
    )
    assert again.dtype == torch.bfloat16
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected(ids).logits)


def test_commands_import_and_export(folder, tmp_path):
    imported = run_command(
        "dualsm.convert", "import", "--format=huggingface", f"--weights={folder}",
        f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert imported.returncode == 0, imported.stderr
    assert "LlamaForCausalLM with 2 layers, d_model=32 and seq_len=64" in imported.stdout
    exported = run_command(
        "dualsm.convert", "export", "--format=huggingface", f"--workdir={tmp_path / 'run'}",
        f"--output={tmp_path / 'out'}", "--max_shard_size=2e-5",
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1


def test_the_advice_for_a_corpus_of_another_tokenizer_works(documents, corpus_path, jsonl, tmp_path):
    """The import adds special tokens, so no corpus of the tokenizer in the folder can match."""
    model, special = make_model("llama", bos_token_id=0, eos_token_id=0), ["<|endoftext|>"]
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(make_tokenizer_json(documents[:200], special))
    load(tmp_path / "model", "", None, tmp_path / "first")
    config = micro_config(corpus_path)
    config.model = open_run(tmp_path / "first").config.model
    advice = "import without --config first, and prepare it again with --tokenizer=WORKDIR/tokenizer.model"
    with pytest.raises(UserError, match=f"{corpus_path} was not prepared .*; {advice} of that run"):
        load(tmp_path / "model", "", config, tmp_path / "second")
    recipe = Recipe(input=str(jsonl), tokenizer=str(tmp_path / "first" / "tokenizer.model"))
    build(recipe, str(tmp_path / "corpus"), workers=1, quiet=True)
    config.data.path = str(tmp_path / "corpus")
    load(tmp_path / "model", "", config, tmp_path / "second")
    assert open_run(tmp_path / "second").config.data.path == str(tmp_path / "corpus")


def test_imported_model_trains_in_a_fork_and_keeps_its_family(tokenizer_json, jsonl, tmp_path):
    model = make_model("qwen3")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer_json)
    load(tmp_path / "model", "", None, tmp_path / "imported")
    recipe = Recipe(input=str(jsonl), tokenizer=str(tmp_path / "model" / "tokenizer.json"))
    build(recipe, str(tmp_path / "corpus"), workers=1, quiet=True)
    config = micro_config(tmp_path / "corpus")
    config.model = open_run(tmp_path / "imported").config.model
    config.steps, config.optimizer.name, config.optimizer.learning_rate = 2, "adamw", 1e-3
    config.valid.objectives, config.valid.num_sequences = "causal", 2
    config.start.run, config.mesh.data = str(tmp_path / "imported"), -1
    assert train(config, tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.step == 2
    export(run, tmp_path / "out")
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(trained) is type(model)
    assert trained.config.max_position_embeddings == SHAPE["max_position_embeddings"]
    ids_BxL = text_ids(run)
    with torch.no_grad():
        expected = trained(external(run, ids_BxL)).logits.numpy()
    text = np.setdiff1d(np.arange(VOCABULARY), run.tokenizer.external_ids_V[:16])
    np.testing.assert_allclose(our_logits(run, ids_BxL)[..., text], expected[..., text], atol=1e-4, rtol=0)


def test_numbers_outside_float16_are_rejected(tmp_path):
    with pytest.raises(UserError, match="--dtype=float16 cannot represent the numbers of a"):
        write_shards(tmp_path, {"a": np.array([1e6], np.float32)}, "float16")


@pytest.fixture(scope="module")
def folder(tokenizer_json, tmp_path_factory):
    """Returns a sharded folder of a tiny Llama."""
    folder = tmp_path_factory.mktemp("sharded")
    make_model("llama").save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text(tokenizer_json)
    return folder


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def change_config(path, **changes):
    content = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


def change_tensors(path, change):
    shard = sorted(path.glob("*.safetensors"))[0]
    tensors = safetensors_torch.load_file(shard)
    change(tensors)
    safetensors_torch.save_file(tensors, shard, {"format": "pt"})
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    kept = {name: file for name, file in content["weight_map"].items() if file != shard.name}
    index.write_text(json.dumps(content | {"weight_map": kept | dict.fromkeys(tensors, shard.name)}))


def missing_shard(path):
    sorted(path.glob("*.safetensors"))[-1].unlink()


def outside(path):
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    index.write_text(
        json.dumps(content | {"weight_map": content["weight_map"] | {name: "../outside.safetensors"}})
    )


def truncated(path):
    shard = sorted(path.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def pickled(path):
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(str(path / "mark"))))


def cut_row(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name][:-1].clone()


MALFORMED = {
    "missing shard": (missing_shard, r"shard model-.*safetensors is missing"),
    "index outside": (outside, r"not a file in its folder"),
    "wrong shape": (lambda p: change_tensors(p, cut_row), r"shape of|rows"),
    "truncated": (truncated, "damaged"),
    "extra tensor": (
        lambda p: change_tensors(p, lambda t: t.update(extra=torch.zeros(2))),
        "unknown tensor extra",
    ),
    "lost tensor": (lambda p: change_tensors(p, lambda t: t.pop(next(iter(t)))), "no tensor model"),
    "an output matrix of its own": (
        lambda p: change_tensors(p, lambda t: t.update({"lm_head.weight": torch.zeros(VOCABULARY, 32)})),
        "lm_head.weight differs from the embedding",
    ),
    "pickle with code": (pickled, "weights-only reader"),
    "unknown architecture": (lambda p: change_config(p, model_type="gpt2"), "model_type='gpt2'"),
    "window": (lambda p: change_config(p, sliding_window=8), "sliding_window=8"),
    "another number of layers": (lambda p: change_config(p, num_hidden_layers=10**9), "have 2 layers"),
    "another number of heads": (lambda p: change_config(p, num_key_value_heads=4), "shape of"),
    "another vocabulary": (lambda p: change_config(p, vocab_size=319), "vocab_size=319"),
    "heads that do not fit": (lambda p: change_config(p, num_key_value_heads=3), "num_kv_heads=3"),
    "no config": (lambda p: (p / "config.json").unlink(), "has no config.json"),
    "config that is no JSON": (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "cannot read tokenizer"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_folder_is_rejected(case, folder, tmp_path):
    change, message = MALFORMED[case]
    (tmp_path / "model").mkdir()
    for file in folder.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    change(tmp_path / "model")
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / "model", "", None, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "mark").exists()
