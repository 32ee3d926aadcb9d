"""Exported models in transformers have the logits, generated tokens and tokenizer of the run."""

import json
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.config import freeze
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.exchange.export_huggingface import export
from dualsm.exchange.imported_run import write_run
from dualsm.exchange.token_ids import to_external
from dualsm.generation.autoregressive import generate
from dualsm.generation.sampling_params import SamplingParams
from dualsm.model.transformer import init_params
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import open_run
from tests.conftest import ROOT
from tests.data.test_tokenizer import DIFFICULT
from tests.exchange.conftest import to_internal
from tests.micro import micro_config

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(ROOT / ".pytest_cache" / "hf_modules")}
torch = pytest.importorskip("torch", reason="torch is not installed (extra test-hf)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra test-hf)")

pytestmark = pytest.mark.extras

LENGTH = 24
CASES = {
    # SentencePiece or tokenizer.json, and head
    "ours": ("sentencepiece", "projected"),
    "foreign": ("json", "projected"),
    "llama": ("sentencepiece", "plain"),
}
OWN = ["ours", "foreign"]  # exported with dualsm's own code, which has more modes than the stock class


@pytest.fixture(scope="module", params=CASES)
def exported(request, corpus_path, tokenizer_json, tmp_path_factory):
    """Returns a run with large random weights, and the folder of its export."""
    kind, head = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    path = corpus_path / "tokenizer.model"
    if kind == "json":
        path = folder / "tokenizer.json"
        path.write_text(tokenizer_json)
    tokenizer = load_tokenizer(str(path))
    config = micro_config()
    config.mesh.data = -1
    config.model.head, config.model.vocab_size = head, tokenizer.vocab_size
    config.model.norm_eps = 1e-3  # not the default, so that using the default fails
    params = init_params(config.model, jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = tree.unflatten(
        [p + 0.3 * jax.random.normal(key, p.shape) for p, key in zip(leaves, keys, strict=True)]
    )
    if kind == "json":
        params = to_internal(
            to_external(params, tokenizer.external_ids_V), tokenizer.external_ids_V
        )  # ids that the file lacks have no logits
    write_run(config, params, tokenizer, folder / "run", {"format": "test", "weights": "w", "sha256": "0"})
    run = open_run(folder / "run")
    export(run, folder / "out")
    return run, folder / "out"


@pytest.fixture(scope="module")
def theirs(exported):
    _, folder = exported
    model, problems = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=is_own(folder), output_loading_info=True
    )
    assert not any(problems.values()), problems
    return model.eval()


def is_own(folder) -> bool:
    return (folder / "modeling_dualsm.py").exists()


def ids_of_text(run, rows: int) -> np.ndarray:
    """Returns random token ids with some masks; each row starts with `<s>`."""
    rng = np.random.default_rng(0)
    known = np.flatnonzero(run.tokenizer.external_ids_V >= 0)
    tokens_BxL = rng.choice(known[known >= 16], (rows, LENGTH))
    tokens_BxL[:, 0] = run.tokenizer.special.bos
    tokens_BxL[:, 5::7] = run.tokenizer.special.mask
    return tokens_BxL


def own_ids_of_text(run, rows: int):
    """Returns the ids of `ids_of_text` as external ids, those of the tokenizer's file."""
    return torch.tensor(run.tokenizer.external_ids_V[ids_of_text(run, rows)]).long()


def our_logits(run, tokens_BxL, key_end_BxL) -> np.ndarray:
    """Returns dualsm's logits in the order of external ids."""
    shape = tokens_BxL.shape
    logits = run.model().logits(
        jnp.asarray(tokens_BxL, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.broadcast_to(key_end_BxL, shape)
    )
    external_ids_V = run.tokenizer.external_ids_V
    found = np.zeros((*shape, external_ids_V.max() + 1), np.float32)
    found[..., external_ids_V[external_ids_V >= 0]] = np.asarray(logits)[..., external_ids_V >= 0]
    return found


def modes(run, theirs):
    """Yields the arguments of `forward` for each mode, and the ends of the key ranges in dualsm."""
    causal_L = jnp.arange(1, LENGTH + 1)
    yield {}, causal_L
    if theirs.config.model_type == "dualsm":
        lengths_B = np.array([3, 10, LENGTH])
        yield {"mode": "masked"}, jnp.full(LENGTH, LENGTH)
        yield {"mode": "prefix"}, jnp.full(LENGTH, LENGTH)
        ends = {"mode": "prefix", "prefix_lengths": torch.tensor(lengths_B)}
        yield ends, jnp.maximum(causal_L, lengths_B[:, None])


def test_logits_are_equal_in_every_mode(exported, theirs):
    run, _ = exported
    tokens_BxL = ids_of_text(run, rows=3)
    own_BxL = torch.tensor(run.tokenizer.external_ids_V[tokens_BxL])
    seen = []
    for arguments, key_end in modes(run, theirs):
        expected = our_logits(run, tokens_BxL, key_end)
        with torch.no_grad():
            found = theirs(input_ids=own_BxL, **arguments).logits.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
        seen.append(found)
    assert np.abs(seen[0]).max() > 1  # large enough for a meaningful comparison
    assert all(np.abs(seen[0] - other).max() > 0.1 for other in seen[1:])


@pytest.mark.parametrize(
    ("exported", "mode"),
    [*((case, "causal") for case in CASES), *((case, "prefix") for case in OWN)],
    indirect=["exported"],
)
def test_greedy_generation_is_equal_token_for_token(exported, theirs, mode):
    run, _ = exported
    prompts = [list(row[: 5 + 3 * i]) for i, row in enumerate(ids_of_text(run, rows=3))]
    sampling, special = SamplingParams(temperature=0), run.tokenizer.special
    *_, expected = generate(freeze(run.config.model), run.params, prompts, 20, sampling, special, mode)
    external_ids_V, pad = run.tokenizer.external_ids_V, theirs.config.pad_token_id
    longest = max(map(len, prompts))
    padded = [[pad] * (longest - len(prompt)) + external_ids_V[prompt].tolist() for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    arguments = {"mode": mode} if mode != "causal" else {}
    found = theirs.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        max_new_tokens=20,
        do_sample=False,
        **arguments,
    )
    for prompt, tokens, row in zip(prompts, expected, found.tolist(), strict=True):
        wanted = external_ids_V[tokens].tolist()
        start = longest - len(prompt)
        assert row[start : start + len(wanted)] == wanted
        assert len(set(wanted[len(prompt) :])) > 2  # not the same token repeatedly


def test_cache_does_not_change_the_logits(exported, theirs):
    run, _ = exported
    own_BxL = own_ids_of_text(run, rows=2)
    with torch.no_grad():
        whole = theirs(input_ids=own_BxL, use_cache=False).logits
        first = theirs(input_ids=own_BxL[:, :7], use_cache=True)
        rest = theirs(input_ids=own_BxL[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("exported", "name"),
    [*((case, "past_key_values") for case in CASES), *((case, "cache") for case in OWN)],
    indirect=["exported"],
)
def test_passed_cache_is_filled_and_used(exported, theirs, name):
    """Also if it is empty, and with `use_cache=False`, which only determines whether it is returned."""
    run, _ = exported
    own_BxL = own_ids_of_text(run, rows=2)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        whole = theirs(input_ids=own_BxL, use_cache=False).logits
        first = theirs(input_ids=own_BxL[:, :7], use_cache=True, **{name: cache})
        assert first.past_key_values is cache
        assert cache.get_seq_length() == 7
        rest = theirs(input_ids=own_BxL[:, 7:], use_cache=False, **{name: cache})
    assert cache.get_seq_length() == LENGTH
    assert rest.past_key_values is (cache if theirs.config.model_type == "llama" else None)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-4, rtol=0)


def difficult_lines(documents) -> list[str]:
    """Returns a thousand lines: those of the documents, and random lines of difficult characters."""
    rng = random.Random(0)
    parts = [" ", "  ", "\t", "\n", "\r\n", "\0", "\x1b", "\x7f", "\u2581", "\u00a0", "\u200d", "\ufeff", "é",
             "e\u0301", "中", "🙂", "👩‍👩‍👧", "<s>", "</s>", "<mask>", "<unk>", "<0x41>", "<reserved_5>",
             "=", "_", "a", "def", "return ", "self."]  # fmt: skip
    lines = [line for text in documents for line in text.splitlines() if line.strip()][:400]
    lines += [f"{' ' * (i % 9)}{line}" for i, line in enumerate(DIFFICULT * 10)]
    while len(lines) < 1000:
        lines.append("".join(rng.choice(parts) for _ in range(rng.randint(1, 12))))
    return lines


def test_the_tokenizer_is_equal_on_a_thousand_difficult_lines(exported, documents):
    run, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=is_own(folder))
    lines = difficult_lines(documents)
    assert len(lines) == 1000
    ours = [run.tokenizer.external_ids_V[tokens].tolist() for tokens in run.tokenizer.encode(lines)]
    assert tokenizer(lines, add_special_tokens=False)["input_ids"] == ours
    bos = tokenizer.bos_token_id
    assert tokenizer(lines)["input_ids"] == [[bos, *tokens] for tokens in ours]
    for line, tokens in zip(lines, ours, strict=True):
        assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == line
    external_ids_V, special = run.tokenizer.external_ids_V, run.tokenizer.special
    names = ("pad", "unk", "bos", "eos", "mask")
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [
        external_ids_V[getattr(special, name)] for name in names
    ]
    read = tokenizer("a<mask>", add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert read[-1] == tokenizer.mask_token_id


def test_labels_are_shifted_once(exported, theirs):
    run, _ = exported
    own_BxL = own_ids_of_text(run, rows=2)
    with torch.no_grad():
        output = theirs(input_ids=own_BxL, labels=own_BxL)
    nll = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), own_BxL[:, 1:].flatten())
    torch.testing.assert_close(output.loss, nll)


@pytest.mark.parametrize("batches", [2, 4])
def test_trainer_accumulates_the_gradient_of_one_large_batch(exported, theirs, batches, tmp_path):
    """Rows have different numbers of labels, so that the mean of means differs from the mean."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate (extra test-hf)")
    from tests.exchange.trainer import check_accumulation

    run, _ = exported
    ids_BxL = own_ids_of_text(run, rows=4)
    labels_BxL = ids_BxL.clone()
    for row, start in enumerate([1, 5, 11, 20]):
        labels_BxL[row, :start] = -100
    rows = [{"input_ids": i, "labels": label} for i, label in zip(ids_BxL, labels_BxL, strict=True)]

    loss = check_accumulation(theirs, rows, batches, tmp_path)
    with torch.no_grad():
        assert loss == pytest.approx(theirs(ids_BxL, labels=labels_BxL).loss.item(), rel=1e-5)


def padded_prompts(run, theirs):
    """Returns arguments of `generate`: prompts of 5, 9 and 12 tokens, padded on the left."""
    ids_BxP = own_ids_of_text(run, rows=3)[:, :12]
    mask_BxP = torch.ones_like(ids_BxP)
    for row, padding in enumerate([7, 3, 0]):
        mask_BxP[row, :padding] = 0
    ids_BxP[mask_BxP == 0] = theirs.config.pad_token_id
    return {"inputs": ids_BxP, "attention_mask": mask_BxP, "max_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("exported", OWN, indirect=True)
@pytest.mark.parametrize("mode", ["causal", "prefix"])
@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}, {"prefill_chunk_size": 5}],
    ids=lambda options: next(iter(options)),
)
def test_generation_options_do_not_change_the_tokens(exported, theirs, mode, options):
    run, _ = exported
    prompts = padded_prompts(run, theirs)
    if mode == "prefix" and "prefill_chunk_size" in options:
        with pytest.raises(ValueError, match="in one call, without prefill_chunk_size"):
            theirs.generate(**prompts, mode=mode, **options)
        return
    if "num_beams" in options:  # beams change the text: compare them with beams without a cache
        expected = theirs.generate(**prompts, mode=mode, use_cache=False, **options)
    else:
        expected = theirs.generate(**prompts, mode=mode)
    assert torch.equal(theirs.generate(**prompts, mode=mode, **options), expected)
    assert len(set(expected[0, 12:].tolist())) > 2


@pytest.mark.parametrize("exported", OWN, indirect=True)
def test_unsupported_arguments_are_rejected(exported, theirs):
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(ValueError, match="does not support inputs_embeds"):
        theirs(ids, inputs_embeds=torch.zeros(1, 4, theirs.config.hidden_size))
    with pytest.raises(ValueError, match="packed sequences"):
        theirs(ids, position_ids=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(ValueError, match="must have the shape \\[batch, length\\]"):
        theirs(ids, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="mode 'masked' is not supported"):
        theirs.generate(ids, mode="masked", max_new_tokens=1)


@pytest.mark.parametrize("exported", OWN, indirect=True)
def test_masked_mode_rejects_a_cache(exported, theirs):
    ids = torch.tensor([[5, 6]])
    cache = theirs(input_ids=ids).past_key_values
    with pytest.raises(ValueError, match="does not support a cache"):
        theirs(input_ids=ids, past_key_values=cache, mode="masked")
    empty = transformers.DynamicCache()
    assert theirs(input_ids=ids, past_key_values=empty, mode="masked").past_key_values is None
    assert empty.get_seq_length() == 0
    with pytest.raises(ValueError, match="telepathy"):
        theirs(input_ids=ids, mode="telepathy")


def test_export_is_complete_or_absent(exported):
    run, folder = exported
    card = (folder / "README.md").read_text()
    assert "| causal | 0.5 |" in card
    assert "repetitions of the data | 1 |" in card
    assert json.dumps(run.config.model.d_model) in card
    assert (folder / "generation_config.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match="already exists"):
        export(run, folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir() if "partial" in path.name] == []
