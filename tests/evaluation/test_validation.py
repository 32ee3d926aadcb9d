"""Validation: independence of batch size, seed and devices; bits per byte."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.devices import sharding
from dualsm.model.transformer import bind, init_params
from dualsm.objectives.mixture import OBJECTIVES
from dualsm.training.valid_rows import valid_rows
from dualsm.training.validation import SourceValidation, Validation
from tests.exchange.conftest import ADDING, make_tokenizer_json, with_normalizers


def rows_of(corpus, length=32, count=0):
    tokenizer = corpus.tokenizer()
    return valid_rows(corpus.documents("valid"), length, count, tokenizer.special, tokenizer.token_bytes())


@pytest.fixture(scope="module")
def rows(corpus):
    return rows_of(corpus)


def some_of(rows, chosen):
    return rows._replace(
        tokens_VxL1=rows.tokens_VxL1[chosen],
        documents_VxL1=rows.documents_VxL1[chosen],
        scale_VxL1=rows.scale_VxL1[chosen],
    )


def validation(config, corpus, rows, devices=1, names=tuple(OBJECTIVES)):
    config.model.vocab_size = corpus.vocab_size
    config.mesh.data = devices
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    return SourceValidation({"": Validation(config, names, corpus.tokenizer().special, rows, mesh)})


@pytest.fixture
def params(micro, corpus):
    micro.model.vocab_size = corpus.vocab_size
    fresh = init_params(micro.model, jax.random.key(0))
    return jax.tree.map(lambda p: p * 3, fresh)


def test_rows_contain_every_held_out_token(corpus, rows):
    documents = corpus.documents("valid")
    whole = np.concatenate(documents.read(range(len(documents))))
    tokens_VxL1, documents_VxL1 = rows[:2]
    flat = np.concatenate([tokens_VxL1[0, :1], tokens_VxL1[:, 1:].ravel()])
    np.testing.assert_array_equal(flat[: len(whole)], whole)
    assert (documents_VxL1[:, 1:].ravel()[len(whole) - 1 :] == -1).all()
    few = rows_of(corpus, count=5)
    np.testing.assert_array_equal(few.tokens_VxL1, tokens_VxL1[:5])


def test_batch_size_seed_and_devices_do_not_matter(micro, corpus, rows, params):
    expected = validation(micro, corpus, rows)(params)
    micro.batch_size, micro.seed = 24, 17
    other = validation(micro, corpus, rows, devices=8)
    with jax.set_mesh(sharding.make_mesh(micro.mesh, jax.devices()[:8])):
        ours = other(params)
    assert ours == pytest.approx(expected, rel=1e-4)


def test_every_scores_a_fraction_of_the_batches(micro, corpus, rows, params):
    batches = -(-len(rows[0]) // micro.batch_size)
    assert batches > 3
    chosen = np.arange(len(rows[0])) % batches % 3 == 0  # spread over the text
    some = some_of(rows, chosen)
    expected = validation(micro, corpus, some, names=("causal",))(params)
    assert validation(micro, corpus, rows, names=("causal",))(params, every=3) == pytest.approx(expected)


def test_causal_loss_and_bits_per_byte_equal_a_direct_computation(micro, corpus, rows, params):
    rows = some_of(rows, [*range(6), -2, -1])  # the last row is padded
    scores = validation(micro, corpus, rows, names=("causal",))(params)
    sizes_V = corpus.tokenizer().token_bytes()

    @jax.jit
    def log_p(tokens_L, start_L):
        ends_L = jnp.arange(1, tokens_L.shape[0] + 1)
        return jax.nn.log_softmax(
            bind(micro.model, params).logits(tokens_L[None], start_L[None], ends_L[None])[0]
        )

    nats, targets = 0.0, []
    for tokens, documents in zip(*rows[:2], strict=True):
        start = np.array([np.flatnonzero(documents == d)[0] for d in documents[:-1]])
        log_p_LxV = np.asarray(log_p(tokens[:-1], start))
        for i in range(len(tokens) - 1):
            if documents[i] == documents[i + 1] >= 0:
                nats -= float(log_p_LxV[i, tokens[i + 1]])
                targets.append(tokens[i + 1])
    assert scores["valid/causal/loss"] == pytest.approx(nats / len(targets), rel=1e-4)
    bits = nats / math.log(2) / sizes_V[np.array(targets)].sum()
    assert scores["valid/causal/bits_per_byte"] == pytest.approx(bits, rel=1e-4)


@pytest.fixture(scope="module")
def adding(documents, tmp_path_factory):
    """Returns a corpus whose tokenizer adds characters to the text and lacks `#`."""
    folder = tmp_path_factory.mktemp("adding")
    content = json.loads(with_normalizers(make_tokenizer_json(documents[:50]), *ADDING))
    content["model"]["vocab"]["filler"] = content["model"]["vocab"].pop("#")
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "#" not in "".join(pair)]
    content["model"]["unk_token"] = "<unk>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:60]))
    recipe = Recipe(
        input=str(folder / "a.jsonl"), tokenizer=str(folder / "tokenizer.json"), valid_fraction=0.5
    )
    build(recipe, str(folder / "corpus"), workers=1, quiet=True)
    return Corpus(str(folder / "corpus"))


def scored_bytes(rows, unk=True) -> float:
    """Returns the bytes of the rows' targets, with or without `<unk>`."""
    tokens, documents, scale = rows[:3]
    scored = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    scored &= unk | (tokens[:, 1:] != 1)
    return float((scored * scale[:, :-1] * rows.token_bytes_V[tokens[:, 1:]]).sum(dtype=np.float64))


def test_scored_bytes_sum_to_the_sizes_of_the_documents(adding):
    documents, sizes_V = adding.documents("valid"), adding.tokenizer().token_bytes()
    read = documents.read(range(len(documents)))
    assert sum(sizes_V[tokens].sum() for tokens in read) > documents.bytes  # would lower bits per byte
    unknown = sum(int((tokens == 1).sum()) for tokens in read)
    assert unknown > 3
    rows = rows_of(adding)
    assert rows.exact
    assert scored_bytes(rows) == pytest.approx(documents.bytes, rel=1e-5)
    # Objectives that never score <unk> are not credited with its bytes.
    assert scored_bytes(rows, unk=False) < documents.bytes
    # A document that the last row cuts off counts with a part of its bytes.
    for count in (1, 2, 7):
        few, end = rows_of(adding, count=count), 32 * count + 1
        np.testing.assert_array_equal(few.scale_VxL1[0], rows.scale_VxL1[0])
        whole = int(np.searchsorted(np.cumsum(documents.lengths_N), end))
        lower, upper = documents.bytes_N[:whole].sum(), documents.bytes_N[: whole + 1].sum()
        assert lower * (1 - 1e-5) <= scored_bytes(few) <= upper * (1 + 1e-5)


def test_rows_of_a_lossless_tokenizer_need_no_correction(corpus, rows):
    assert rows.exact and (rows.scale_VxL1 == 1).all()
    np.testing.assert_array_equal(rows.token_bytes_V, corpus.tokenizer().token_bytes())
    assert scored_bytes(rows) == corpus.documents("valid").bytes


def test_corpus_without_document_sizes_uses_the_bytes_of_tokens(corpus_path, rows, tmp_path):
    shutil.copytree(corpus_path, tmp_path / "corpus")
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    for key in ("document_bytes", "document_bytes_sha256"):
        del manifest["splits"]["valid"][key]
    del manifest["round_trip"]
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "corpus" / "valid-bytes.int64").unlink()
    older = rows_of(Corpus(str(tmp_path / "corpus")))
    assert not older.exact
    for one, other in zip(older[:4], rows[:4], strict=True):
        np.testing.assert_array_equal(one, other)


def test_bits_per_byte_divide_by_the_bytes_of_the_documents(micro, adding):
    micro.model.vocab_size = adding.vocab_size
    documents, rows = adding.documents("valid"), rows_of(adding)
    params = init_params(micro.model, jax.random.key(0))
    scores = validation(micro, adding, rows, names=("causal",))(params)
    nats = scores["valid/causal/loss"] * (documents.lengths_N - 1).sum()
    bits = nats / math.log(2) / documents.bytes
    assert scores["valid/causal/bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_each_objective_is_scored_with_its_own_examples(micro, corpus, rows, params):
    micro.objectives.block_diffusion.block = 8  # one block per row equals masked_diffusion
    together = validation(micro, corpus, rows)(params)
    assert len({round(value, 6) for value in together.values()}) == len(together)
    for name in OBJECTIVES:
        alone = validation(micro, corpus, rows, names=(name,))(params)
        assert alone[f"valid/{name}/loss"] == pytest.approx(together[f"valid/{name}/loss"], rel=1e-5)


def test_options_of_training_do_not_change_the_validation_task(micro, corpus, rows, params):
    expected = validation(micro, corpus, rows)(params)
    diffusion = micro.objectives.masked_diffusion
    diffusion.time, diffusion.exact, diffusion.clip = "bell", False, 2.0
    micro.objectives.masked.first = micro.objectives.masked.last = 0.9
    micro.objectives.masked_input_causal.high = 0.5
    assert validation(micro, corpus, rows)(params) == expected
    diffusion.shifted = False  # this option defines the validation task
    changed = validation(micro, corpus, rows, names=("masked_diffusion",))(params)
    assert changed["valid/masked_diffusion/loss"] != expected["valid/masked_diffusion/loss"]
