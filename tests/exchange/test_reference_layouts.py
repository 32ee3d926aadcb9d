"""All layouts of the paper's code are imported as the same run."""

import json
import re
from unittest import mock

import jax
import numpy as np
import pytest

from dualsm.exchange import imported_run
from dualsm.exchange.import_reference import load
from dualsm.exchange.weight_files import write_safetensors
from dualsm.process.errors import UserError
from tests.exchange.conftest import SPECIAL, VOCABULARY, read_all
from tests.exchange.test_weight_files import write_torch


def imported(folder, tmp_path):
    """Imports a folder; returns the config, the parameters and the message."""
    with mock.patch.object(imported_run, "write_run") as write:
        message = load(folder, "", None, tmp_path / "run")
    config, params, *_ = write.call_args.args
    return config, params, message


@pytest.fixture
def write(released_alone, tmp_path):
    """Writes a variant of the released folder."""

    def variant(tensors=None, name="model.safetensors", config=None, wrap=lambda state: state):
        folder = tmp_path / "variant"
        folder.mkdir()
        tensors = read_all(released_alone / "model.safetensors") if tensors is None else tensors
        if name.endswith(".bin"):
            write_torch(folder / name, tensors, wrap=wrap)
        else:
            write_safetensors(folder / name, tensors, {"format": "pt"})
        (folder / "tokenizer.json").write_bytes((released_alone / "tokenizer.json").read_bytes())
        settings = json.loads((released_alone / "config.json").read_text()) if config is None else config
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return variant


@pytest.fixture
def plain(released_alone, tmp_path):
    """Returns the config and the parameters of the plain layout."""
    config, params, _ = imported(released_alone, tmp_path)
    return config, params


def check_equal(found, expected) -> None:
    assert found[0].to_dict() == expected[0].to_dict()
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def renamed(released_alone, function) -> dict:
    return {function(name): x for name, x in read_all(released_alone / "model.safetensors").items()}


@pytest.mark.parametrize("name", ["state_dict.bin", "pytorch_model.bin", "state_dict.safetensors"])
def test_file_names(write, plain, tmp_path, name):
    check_equal(imported(write(name=name), tmp_path), plain)


def test_nested_under_model(write, plain, tmp_path):
    folder = write(name="state_dict.bin", wrap=lambda state: {"model": state, "global_step": 8192})
    config, params, message = imported(folder, tmp_path)
    check_equal((config, params), plain)
    assert message.endswith("not used: global_step")


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "param.", "module._orig_mod.model."])
def test_prefixes(write, plain, released_alone, tmp_path, prefix):
    check_equal(imported(write(renamed(released_alone, lambda name: prefix + name)), tmp_path), plain)


def test_compiled_layers(write, plain, released_alone, tmp_path):
    tensors = renamed(released_alone, lambda name: re.sub(r"(layers[.][0-9]+)", r"\1._orig_mod", name))
    check_equal(imported(write(tensors), tmp_path), plain)


@pytest.mark.parametrize("names", [("qkv_proj",), ("up_proj",), ("qkv_proj", "up_proj")])
def test_fused_projections(write, plain, released_alone, tmp_path, names):
    tensors = read_all(released_alone / "model.safetensors")
    for stem in {m[1] for name in tensors if (m := re.match(r"(.*_proj)[.]weights[.]0$", name))}:
        if stem.endswith(names):
            parts = sorted(name for name in tensors if name.startswith(f"{stem}.weights."))
            tensors[f"{stem}.weight"] = np.concatenate([tensors.pop(name) for name in parts])
    assert len(tensors) < len(read_all(released_alone / "model.safetensors"))
    check_equal(imported(write(tensors), tmp_path), plain)


def test_ignored_buffers_are_named(write, plain, released_alone, tmp_path):
    tensors = read_all(released_alone / "model.safetensors")
    for layer in range(2):
        for name in ("cos_matrix", "sin_matrix", "inv_freq"):
            tensors[f"encoder.layers.{layer}.attention.rope_embedding.{name}"] = np.ones((4, 8), np.float32)
    folder = write(tensors)
    config, params, message = imported(folder, tmp_path)
    check_equal((config, params), plain)
    assert message.partition("not used: ")[2].split(", ") == [
        f"encoder.layers.*.attention.rope_embedding.{name}"
        for name in ("cos_matrix", "inv_freq", "sin_matrix")
    ]


def test_integer_buffers_are_ignored(write, plain, released_alone, tmp_path):
    from safetensors.numpy import save_file

    folder = write()
    tensors = read_all(released_alone / "model.safetensors")
    tensors["encoder.position_indices"] = np.arange(9)
    save_file(tensors, folder / "model.safetensors")
    config, params, message = imported(folder, tmp_path)
    check_equal((config, params), plain)
    assert message.endswith("not used: encoder.position_indices")


UNKNOWN = {
    "encoder.layers.0.attention.query_norm.weight": "unknown tensors",
    "encoder.layers.0.attention.out_proj.bias": "unknown tensors",
    "module.encoder.layers.0.mlp.down_proj.weight": "are the same tensor of the model",
    "encoder.layers.0.attention.qkv_proj.weight": "are the same projection",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_tensors_are_rejected_by_name(write, released_alone, tmp_path, name):
    tensors = read_all(released_alone / "model.safetensors") | {name: np.ones((192, 64), np.float32)}
    with pytest.raises(UserError, match=UNKNOWN[name]) as error:
        imported(write(tensors), tmp_path)
    assert name in str(error.value)


OTHER_NAMES = {
    "num_layers": ["num_hidden_layers"],
    "d_h": ["query_key_head_size", "head_dim"],
    "norm_eps": ["layer_norm_eps", "rms_norm_eps"],
    "max_sequence_length": ["max_position_embeddings"],
}


@pytest.mark.parametrize(
    ("name", "other"), [(n, other) for n, others in OTHER_NAMES.items() for other in others]
)
def test_settings_have_several_names(write, plain, released_alone, tmp_path, name, other):
    settings = json.loads((released_alone / "config.json").read_text())
    settings[other] = settings.pop(name)
    check_equal(imported(write(config=settings), tmp_path), plain)


def test_settings_are_those_of_the_weights(plain):
    config, _ = plain
    model = config.model
    assert (model.num_layers, model.d_model, model.num_heads, model.d_ff) == (2, 64, 4, 172)
    assert (model.norm_eps, model.rope_theta, config.seq_len) == (1e-7, 160_000, 48)


def test_number_of_heads_is_computed_from_their_size(write, plain, released_alone, tmp_path):
    settings = json.loads((released_alone / "config.json").read_text())
    del settings["num_attention_heads"]
    check_equal(imported(write(config=settings), tmp_path), plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 32}, "contradict each other"),
        ({"d_h": 32}, "times d_h=32 must be 64"),
        ({"d_h": 5}, "d_h=5 must divide d_model=64"),
        ({"num_hidden_layers": 3}, "contradict each other"),
        ({"max_sequence_length": 0}, "must be a positive integer"),
        ({"hidden_size": 128}, "hidden_size=128 but the weights have 64"),
    ],
)
def test_contradicting_settings_are_rejected(write, released_alone, tmp_path, changes, message):
    settings = json.loads((released_alone / "config.json").read_text()) | changes
    with pytest.raises(UserError, match=message):
        imported(write(config=settings), tmp_path)


def test_switches_that_the_format_lacks_are_rejected(plain, released_alone, tmp_path):
    recipe = plain[0].copy_and_resolve_references()
    recipe.model.norm_placement = "post"
    with pytest.raises(UserError, match="does not support config.model.norm_placement; remove"):
        load(released_alone, "", recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def paper_tokenizer(texts) -> str:
    """A tokenizer with the parts of the paper's: a blank in front, NFC, `ignore_merges`, ids 0 to 15."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", ignore_merges=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Prepend(" "),
            normalizers.NFC(),
            normalizers.Replace(Regex("\n"), "\n "),
            normalizers.Replace(Regex(" *\n"), "\n"),
        ]
    )
    split = pre_tokenizers.Split(Regex(r"\s?\p{L}+|\s?[^\s\p{L}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Strip(" ", 1, 0), decoders.Replace("\n ", "\n")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def test_the_tokenizer_of_the_paper(write, documents, tmp_path):
    from tokenizers import Tokenizer

    content, folder = paper_tokenizer(documents[:200]), write()
    assert [json.loads(content)["model"]["vocab"][piece] for piece in SPECIAL] == list(range(16))
    (folder / "tokenizer.json").write_text(content)
    with mock.patch.object(imported_run, "write_run") as written:
        load(folder, "", None, tmp_path / "run")
    _, params, tokenizer, *_ = written.call_args.args
    theirs = Tokenizer.from_str(content)
    for text in ["Hello world\nfoo  bar", "cafe\u0301 \u4e2d", "a\n\n b", *documents[:20]]:
        (tokens,) = tokenizer.encode([text])
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.external_ids_V[tokens].tolist() == expected
        assert tokenizer.decode(tokens) == theirs.decode(expected)
    embedding = read_all(folder / "model.safetensors")["embedding.word_embedding.weight"]
    for role, token in {"unk": 0, "bos": 1, "eos": 2, "pad": 3, "mask": 4}.items():
        row = params["embedding"]["embedding"][getattr(tokenizer.special, role)]
        np.testing.assert_array_equal(row, embedding[token])
