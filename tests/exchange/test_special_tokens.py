"""Model folders without `<s>` or `<mask>`: special roles, added tokens and masked ids."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import default_config, freeze
from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.data.special_roles import SpecialRoles
from dualsm.data.tokenizer import RESERVED_IDS, SpecialIds
from dualsm.data.tokenizer_json import JsonTokenizer
from dualsm.devices.sharding import make_mesh
from dualsm.evaluation.modes import ScoringParams
from dualsm.evaluation.scoring import Scorer
from dualsm.exchange.imported_run import write_run
from dualsm.exchange.special_tokens import adapt_tokenizer
from dualsm.exchange.token_ids import internal_array, never_predicted, to_external
from dualsm.generation import autoregressive, diffusion
from dualsm.generation.diffusion import UnmaskingParams
from dualsm.generation.prompts import encode_prompt
from dualsm.generation.sampling_params import SamplingParams
from dualsm.model import id_ranges
from dualsm.model.transformer import bind, init_params
from dualsm.objectives.example import Row
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import open_run
from dualsm.training.loop import train
from dualsm.training.objective_loss import objective_loss
from tests.exchange.conftest import VOCABULARY, make_tokenizer_json, to_internal
from tests.micro import micro_config

pytestmark = pytest.mark.slow

CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|reserved|>"]


@pytest.fixture(scope="module")
def chat_json(documents) -> str:
    """Returns a tokenizer like that of SmolLM2, without `<s>`, `</s>` and `<mask>`."""
    return make_tokenizer_json(documents[:100], CHAT)


@pytest.fixture
def folder(chat_json, tmp_path):
    (tmp_path / "tokenizer.json").write_text(chat_json)
    return tmp_path


def adapt(folder, num_ids=VOCABULARY, mask_token="", **files):
    """Writes config files and adapts the tokenizer."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return adapt_tokenizer(folder, folder / "tokenizer.json", num_ids, mask_token)


CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def external(tokenizer, role: str) -> int:
    return int(tokenizer.external_ids_V[getattr(tokenizer.special, role)])


def test_roles_are_read_from_the_config_files(folder):
    tokenizer, messages = adapt(folder, config=CONFIG)
    assert [external(tokenizer, role) for role in ("bos", "eos", "mask")] == [1, 2, VOCABULARY]
    assert tokenizer.piece(tokenizer.special.bos) == "<|im_start|>"
    assert messages == [
        "bos: <|im_start|> (id 1)",
        "eos: <|im_end|> (id 2)",
        f"mask: <mask> is added with the id {VOCABULARY}",
    ]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": CONFIG, "generation_config": {"bos_token_id": 0, "eos_token_id": [3, 2]}}, (1, 2)),
        ({"generation_config": {"bos_token_id": 0, "eos_token_id": [3, 2]}}, (0, 3)),
        ({"tokenizer_config": {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}}, (1, 2)),
        ({"config": {"bos_token_id": None, "eos_token_id": 2}}, (VOCABULARY, 2)),
        ({}, (VOCABULARY, VOCABULARY + 1)),
    ],
)
def test_precedence_of_config_files(folder, files, expected):
    tokenizer, messages = adapt(folder, **files)
    assert (external(tokenizer, "bos"), external(tokenizer, "eos")) == expected
    assert any("the first one is used" in message for message in messages) == (len(files) == 2)


def test_ids_that_do_not_exist_are_rejected(folder):
    with pytest.raises(UserError, match=r"config\.json: eos_token_id=9999 is not an id of the tokenizer"):
        adapt(folder, config={"eos_token_id": 9999})


def test_a_spare_token_can_be_the_mask(folder):
    tokenizer, messages = adapt(folder, mask_token="<|reserved|>", config=CONFIG)
    assert external(tokenizer, "mask") == 3
    assert tokenizer.external_ids_V.max() == VOCABULARY - 1  # nothing was added
    assert tokenizer.special.mask in ids(never_predicted(tokenizer, VOCABULARY))
    assert "mask: <|reserved|> (id 3)" in messages


@pytest.mark.parametrize(
    ("mask", "message"), [("<|nothing|>", "is not in the tokenizer"), ("<|im_end|>", "another special token")]
)
def test_invalid_masks_are_rejected(folder, mask, message):
    with pytest.raises(UserError, match=message):
        adapt(folder, mask_token=mask, config=CONFIG)


def test_bos_and_eos_can_be_one_token(folder):
    tokenizer, _ = adapt(folder, config={"bos_token_id": 0, "eos_token_id": 0})
    assert tokenizer.special.bos == tokenizer.special.eos
    assert external(tokenizer, "bos") == 0
    assert tokenizer.from_external_ids(np.array([0])).tolist() == [tokenizer.special.eos]
    assert tokenizer.special.eos not in ids(never_predicted(tokenizer, VOCABULARY))
    known = tokenizer.external_ids_V[tokenizer.external_ids_V >= 0]
    masked = tokenizer.external_ids_V[sorted(ids(never_predicted(tokenizer, VOCABULARY)))]
    assert (known == 0).sum() - (masked == 0).sum() == 1  # one way to predict it


def test_text_is_encoded_as_by_the_original_file(folder, chat_json, documents):
    from tokenizers import Tokenizer

    tokenizer, _ = adapt(folder, config=CONFIG)
    theirs = Tokenizer.from_str(chat_json)
    for text in documents[:20]:
        tokens = tokenizer.encode([text])[0]
        assert tokenizer.external_ids_V[tokens].tolist() == theirs.encode(text).ids
        assert tokenizer.decode(tokens) == text
    assert min(tokenizer.encode(["<|im_end|><mask><|endoftext|>"])[0]) >= RESERVED_IDS


def test_adapted_file_is_a_complete_tokenizer(folder):
    tokenizer, _ = adapt(folder, num_ids=VOCABULARY + 9, config=CONFIG)
    again = JsonTokenizer(tokenizer.model)
    np.testing.assert_array_equal(again.external_ids_V, tokenizer.external_ids_V)
    assert (again.special, again.unused_ids) == (tokenizer.special, tokenizer.unused_ids)
    assert "dualsm" not in json.loads(tokenizer.file())
    assert again.decode(range(again.vocab_size)) == tokenizer.decode(range(tokenizer.vocab_size))
    assert again.token_bytes().shape == (again.vocab_size,)


def test_a_mask_is_added_beside_tokens_with_the_usual_names(documents, tmp_path):
    usual = ["<unk>", "<s>", "</s>", "<pad>"]
    (tmp_path / "tokenizer.json").write_text(make_tokenizer_json(documents[:50], usual))
    tokenizer, messages = adapt(tmp_path)
    assert [external(tokenizer, role) for role in ("bos", "eos", "mask")] == [1, 2, VOCABULARY]
    assert messages[-1] == f"mask: <mask> is added with the id {VOCABULARY}"


def test_damaged_tokenizer_is_reported_as_such(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer.json"):
        adapt(tmp_path, config={"bos_token_id": 1})


def test_file_with_all_special_tokens_is_unchanged(tokenizer_json, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    tokenizer, messages = adapt(tmp_path)
    assert tokenizer.model == tokenizer_json.encode()
    assert messages == []


@pytest.mark.parametrize(
    "roles",
    [
        SpecialRoles({"mask": "<mask>"}, 3),
        SpecialRoles(num_ids=10**12),
        SpecialRoles(num_ids=-1),
        SpecialRoles(num_ids="3"),
    ],
)
def test_damaged_roles_are_rejected(chat_json, roles):
    content = json.loads(chat_json)
    roles.write_to(content)
    with pytest.raises(UserError, match="its key dualsm is damaged"):
        JsonTokenizer(json.dumps(content).encode())


@pytest.mark.parametrize("spare", [0, 5])
def test_unused_ids_of_the_weights_are_kept_and_never_predicted(folder, spare):
    """The mask gets the first spare id, if there is one."""
    tokenizer, _ = adapt(folder, num_ids=VOCABULARY + spare, config=CONFIG)
    assert external(tokenizer, "mask") == VOCABULARY
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((VOCABULARY + spare, 8), np.float32)
    params = {"embedding": {"embedding": embedding}, "head": {"output": {"kernel": embedding.T.copy()}}}
    internal = to_internal(params, tokenizer.external_ids_V)
    back = to_external(internal, tokenizer.external_ids_V)
    np.testing.assert_array_equal(back["embedding"]["embedding"][: VOCABULARY + spare], embedding)
    np.testing.assert_array_equal(back["head"]["output"]["kernel"][:, : VOCABULARY + spare], embedding.T)
    masked = {int(tokenizer.external_ids_V[i]) for i in ids(never_predicted(tokenizer, VOCABULARY + spare))}
    assert set(range(VOCABULARY, VOCABULARY + max(spare, 1))) <= masked
    assert not set(range(4, VOCABULARY)) & masked


def test_new_rows_are_the_mean_of_all_rows(folder):
    tokenizer, _ = adapt(folder, config=CONFIG)
    embedding = np.random.default_rng(0).normal(3, 1, (VOCABULARY, 64)).astype(np.float32)
    mask = tokenizer.special.mask
    found = internal_array("embedding/embedding", embedding, tokenizer.external_ids_V)
    difference = found[mask] - embedding.mean(0)
    assert 0 < np.abs(difference).max() < 0.1
    again = internal_array("embedding/embedding", embedding, tokenizer.external_ids_V)
    np.testing.assert_array_equal(found, again)
    kernel = internal_array("head/output/kernel", embedding.T, tokenizer.external_ids_V)
    np.testing.assert_array_equal(kernel[:, mask], found[mask])


def ids(text: str) -> set[int]:
    return {token for first, last in id_ranges.parse(text) for token in range(first, last + 1)}


@pytest.mark.parametrize("numbers", [[], [3], [0, 1, 2, 9], [5, 7, 8]])
def test_ranges_of_ids(numbers):
    text = id_ranges.join(numbers)
    assert id_ranges.is_valid(text)
    assert ids(text) == set(numbers)
    assert np.flatnonzero(id_ranges.contains(text, jnp.arange(12))).tolist() == numbers


@pytest.mark.parametrize("text", ["a", "3-", "-3", "4-2", "1,,2", "1, 2"])
def test_invalid_ranges_are_rejected(text):
    assert not id_ranges.is_valid(text)


SPECIAL = SpecialIds(vocab_size=64)
LARGE = np.array([17, 40])
HEADS = [("projected", False), ("plain", False), ("plain", True)]


@pytest.fixture(scope="module", params=HEADS, ids=str)
def masked_model(request):
    """Returns a model in which masked ids would have the largest logits."""
    head, tied = request.param
    config = default_config().model
    config.num_layers, config.d_model, config.num_heads, config.d_ff = 1, 16, 2, 16
    config.vocab_size, config.head, config.tie_word_embeddings = 64, head, tied
    config.attention, config.remat = "xla", "none"
    params = init_params(config, jax.random.key(0))
    output = params["head"].get("output", {})
    if head == "projected":
        output["bias"] = output["bias"].at[LARGE].set(50.0)
    elif tied:
        params["embedding"]["embedding"] = params["embedding"]["embedding"].at[LARGE].multiply(100.0)
    else:
        output["kernel"] = output["kernel"].at[:, LARGE].multiply(100.0)
    config.never_predicted = "4-15,17,40-41"
    return config, params


def inputs():
    tokens_BxL = jnp.asarray(np.random.default_rng(0).integers(16, 64, (2, 12)), jnp.int32)
    return tokens_BxL, jnp.zeros_like(tokens_BxL), jnp.broadcast_to(jnp.arange(1, 13), (2, 12))


def test_masked_ids_have_no_probability_and_no_gradient(masked_model):
    """The other logits are unchanged; without masked ids the logits equal those of the plain model."""
    config, params = masked_model
    masked = sorted(ids(config.never_predicted))
    others = sorted(set(range(64)) - set(masked))
    off = config.copy_and_resolve_references()
    off.never_predicted = ""
    logits, plain = (np.asarray(bind(c, params).logits(*inputs())) for c in (config, off))
    np.testing.assert_array_equal(logits[..., others], plain[..., others])
    assert np.asarray(jax.nn.softmax(logits))[..., masked].max() == 0
    assert np.asarray(jax.nn.softmax(plain))[..., masked].max() > 0.01

    loss = objective_loss("causal", config, SPECIAL)
    tokens = jnp.asarray(np.tile(others[-9:], (2, 1)), jnp.int32)
    zeros = jnp.zeros(2, jnp.int32)
    row = Row(tokens, jnp.zeros_like(tokens), zeros, zeros + 1, jnp.zeros(2))

    def mean(params):
        total, denominator, _ = loss(params, row, jax.random.key(0))
        return total / denominator

    value, gradient = jax.value_and_grad(mean)(params)
    expected = jax.nn.log_softmax(bind(config, params).logits(tokens[:, :-1], *ranges(tokens.shape[1] - 1)))
    picked = jnp.take_along_axis(expected, tokens[:, 1:, None], -1)
    assert float(value) == pytest.approx(-float(picked.mean()), rel=1e-5)
    output = gradient["head"].get("output", {})
    for name, leaf in output.items():
        leaf = np.asarray(leaf)
        assert np.abs(leaf[..., masked]).max() == 0, name
        assert np.abs(leaf[..., others]).max() > 0, name


def test_scores_of_all_other_tokens_sum_to_one(masked_model):
    config, params = masked_model
    masked = ids(config.never_predicted)
    mesh = make_mesh(default_config().mesh, jax.devices()[:1])
    tokenizer = types.SimpleNamespace(special=SPECIAL)
    for mode in ("causal", "prefix", "masked"):
        scorer = Scorer(freeze(config), params, tokenizer, mesh)
        pairs = [([20, 21], [token]) for token in range(64)]
        scores = scorer.score_tokens(pairs, ScoringParams(mode, (1,), 1, 16), quiet=True)
        totals = scores.log_likelihood_N
        others = sorted(set(range(64)) - masked)
        assert np.exp(totals[others]).sum() == pytest.approx(1, abs=1e-4)
        assert np.exp(totals[sorted(masked)]).max() == 0


def ranges(length: int):
    return jnp.zeros((2, length), jnp.int32), jnp.broadcast_to(jnp.arange(1, length + 1), (2, length))


def test_masked_ids_are_never_decoded(masked_model):
    config, params = masked_model
    special, sampling = SPECIAL, SamplingParams(temperature=0.0)
    prompts = [[special.bos, 20, 21], [special.bos, 30]]
    for mode in ("causal", "prefix"):
        *_, found = autoregressive.generate(freeze(config), params, prompts, 8, sampling, special, mode)
        assert not ids(config.never_predicted) & {token for row in found for token in row[3:]}
    off = config.copy_and_resolve_references()
    off.never_predicted = ""
    *_, found = autoregressive.generate(freeze(off), params, prompts, 8, sampling, special, "causal")
    assert {17, 40} & {token for row in found for token in row[3:]}
    masked = [[*prompt, *[special.mask] * 6] for prompt in prompts]
    *_, found = diffusion.infill(freeze(config), params, masked, sampling, UnmaskingParams(), special)
    assert not {17, 40, 41} & {token for row in found for token in row}


@pytest.fixture(scope="module")
def forked(chat_json, jsonl, tmp_path_factory):
    """A run of a model with one token for BOS and EOS, and a trained fork of it."""
    folder = tmp_path_factory.mktemp("one_token")
    (folder / "tokenizer.json").write_text(chat_json)
    tokenizer, _ = adapt(folder, config={"bos_token_id": 0, "eos_token_id": 0})
    config = micro_config()
    config.model.vocab_size, config.model.tie_word_embeddings = tokenizer.vocab_size, False
    config.model.never_predicted = never_predicted(tokenizer, VOCABULARY)
    config.mesh.data, config.optimizer.name, config.optimizer.weight_decay = -1, "adamw", 0.0
    params = init_params(config.model, jax.random.key(1))
    write_run(config, params, tokenizer, folder / "run", {"format": "test", "weights": "w", "sha256": "0"})
    recipe = Recipe(input=str(jsonl), tokenizer=str(folder / "run" / "tokenizer.model"), valid_fraction=0.05)
    build(recipe, str(folder / "corpus"), workers=1, quiet=True)
    fork = config.copy_and_resolve_references()
    fork.data.path, fork.start.run = str(folder / "corpus"), str(folder / "run")
    fork.model.never_predicted, fork.model.vocab_size = "", 0  # as in a config of a user
    assert train(fork, folder / "fork")
    return open_run(folder / "run"), open_run(folder / "fork"), Corpus(str(folder / "corpus"))


def test_documents_begin_and_end_with_the_shared_token(forked):
    run, _, corpus = forked
    assert corpus.manifest["tokenizer_sha256"] == run.tokenizer.sha256()
    special = run.tokenizer.special
    assert special.bos == special.eos
    (tokens,) = corpus.documents("valid").read([0])
    assert (tokens[0], tokens[-1]) == (special.bos, special.eos)
    assert min(tokens[1:-1]) >= RESERVED_IDS


def test_a_fork_masks_the_same_ids_and_never_trains_them(forked):
    run, fork, _ = forked
    masked = sorted(ids(run.config.model.never_predicted))
    assert run.tokenizer.special.mask in masked
    assert fork.config.model.never_predicted == run.config.model.never_predicted
    before, after = (r.params["head"]["output"] for r in (run, fork))
    others = sorted(set(range(run.tokenizer.vocab_size)) - set(masked))
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(before[name][..., masked], after[name][..., masked])
        assert np.abs(before[name] - after[name])[..., others].max() > 0


def test_a_shared_token_ends_texts_and_does_not_end_prompts(forked):
    """A model that always predicts the shared token stops at once."""
    run, _, _ = forked
    special, params = run.tokenizer.special, jax.tree.map(jnp.asarray, run.params)
    params["head"]["output"]["bias"] = params["head"]["output"]["bias"].at[special.eos].set(1e3)
    prompts = [encode_prompt(run.tokenizer, "def f(x):"), encode_prompt(run.tokenizer, "a")]
    sampling = SamplingParams(temperature=0.0)
    config = freeze(run.config.model)
    *_, found = autoregressive.generate(config, params, prompts, 6, sampling, special, "causal")
    assert [list(row) for row in found] == [[*prompt, special.eos] for prompt in prompts]
