"""Fixtures for import and export: Hugging Face tokenizers, and weights in the paper's format."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from dualsm.exchange.token_ids import VOCABULARY_AXIS, internal_array
from dualsm.exchange.weight_files import open_weights, write_safetensors

FIXTURE = Path(__file__).parents[1] / "data" / "model_parity.safetensors"
VOCABULARY = 320  # of the fixture
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", *(f"<special_{i}>" for i in range(11))]


def read_all(path) -> dict[str, np.ndarray]:
    """Returns all tensors of a weight file."""
    weights = open_weights(path)
    return {name: weights.read(name) for name in weights.tensors}


def make_tokenizer_json(texts, special=SPECIAL, seed=None) -> str:
    """Returns a byte-level BPE like the paper's; `seed` shuffles all ids, including special ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    content = json.loads(tokenizer.to_str())
    if seed is not None:
        new = np.random.default_rng(seed).permutation(VOCABULARY).tolist()
        content["model"]["vocab"] = {piece: new[i] for piece, i in content["model"]["vocab"].items()}
        for token in content["added_tokens"]:
            token["id"] = new[token["id"]]
        content["added_tokens"].sort(key=lambda token: token["id"])
    return json.dumps(content)


def with_normalizers(tokenizer_json: str, *normalizers: dict) -> str:
    """Returns the `tokenizer.json` with a normalizer."""
    return json.dumps(
        json.loads(tokenizer_json) | {"normalizer": {"type": "Sequence", "normalizers": list(normalizers)}}
    )


ADDING = (  # normalizers that add characters
    {"type": "Prepend", "prepend": " "},
    {"type": "Replace", "pattern": {"String": "\n"}, "content": "\n "},
)


@pytest.fixture(scope="session")
def tokenizer_json(documents) -> str:
    """Returns the path of a `tokenizer.json` whose special tokens have random ids."""
    return make_tokenizer_json(documents[:200], seed=0)


@pytest.fixture(scope="session")
def released_alone(tokenizer_json, tmp_path_factory) -> Path:
    """The weights of the fixture under their plain names, their config.json and a tokenizer."""
    folder = tmp_path_factory.mktemp("released_alone")
    tensors = {
        name.removeprefix("param."): tensor
        for name, tensor in read_all(FIXTURE).items()
        if name.startswith("param.")
    }
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    settings = {name: json.loads(value) for name, value in open_weights(FIXTURE).metadata.items()}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(tokenizer_json)
    return folder


@pytest.fixture(scope="session")
def released(tokenizer_json, tmp_path_factory) -> Path:
    """Returns a folder with the fixture's weights and a tokenizer, as in a release."""
    folder = tmp_path_factory.mktemp("released")
    (folder / "model.safetensors").write_bytes(FIXTURE.read_bytes())
    (folder / "tokenizer.json").write_text(tokenizer_json)
    return folder


def to_internal(params: dict, external_ids_V: np.ndarray) -> dict:
    """Converts parameters from external to internal ids; see `internal_array`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in VOCABULARY_AXIS.keys() & flat.keys():
        flat[path] = internal_array(path, np.asarray(flat[path]), external_ids_V)
    return traverse_util.unflatten_dict(flat, sep="/")
