"""Hugging Face `tokenizer.json` files as tokenizers."""

import json

import numpy as np
import pytest

from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.data.tokenizer import RESERVED_IDS, SPECIAL_PIECES, SpecialIds
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.data.tokenizer_json import JsonTokenizer, external_ids
from dualsm.exchange.tokenizer_export import added_token, to_json
from dualsm.generation.prompts import encode_prompt, show
from dualsm.process.errors import UserError
from tests.data.test_tokenizer import DIFFICULT, PLAIN, custom_model, random_lines
from tests.exchange.conftest import ADDING, SPECIAL, VOCABULARY, make_tokenizer_json, with_normalizers


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json):
    return JsonTokenizer(tokenizer_json.encode())


def test_ids_are_renumbered_external_ids(tokenizer, tokenizer_json):
    from tokenizers import Tokenizer as Theirs

    theirs = Theirs.from_str(tokenizer_json)
    assert min(theirs.token_to_id(piece) for piece in SPECIAL) < RESERVED_IDS < VOCABULARY
    assert max(theirs.token_to_id(piece) for piece in SPECIAL) >= RESERVED_IDS
    for text in DIFFICULT:
        if "<s>" not in text:  # the library encodes special tokens in a text as such
            expected = theirs.encode(text, add_special_tokens=False).ids
            assert tokenizer.external_ids_V[tokenizer.encode([text])[0]].tolist() == expected


def test_special_tokens_have_reserved_ids_and_text_does_not(tokenizer):
    for name, piece in SPECIAL_PIECES.items():
        assert tokenizer.piece(getattr(tokenizer.special, name)) == piece
    others = {tokenizer.piece(i) for i in range(len(SPECIAL_PIECES), RESERVED_IDS)}
    assert others == set(SPECIAL) - set(SPECIAL_PIECES.values())
    for tokens in tokenizer.encode(DIFFICULT):
        assert min(tokens) >= RESERVED_IDS


def test_text_round_trips_and_token_bytes_sum_to_its_size(tokenizer):
    sizes_V = tokenizer.token_bytes()
    assert not sizes_V[:RESERVED_IDS].any()
    for text, tokens in zip(DIFFICULT, tokenizer.encode(DIFFICULT), strict=True):
        assert tokenizer.decode(tokens) == text
        assert tokenizer.decode([2, *tokens, 4, 3]) == text
        assert sizes_V[tokens].sum() == len(text.encode())
    assert tokenizer.encode([""]) == [[]]


def test_every_external_id_has_an_internal_id(tokenizer):
    assert sorted(tokenizer.external_ids_V[tokenizer.external_ids_V >= 0]) == list(range(VOCABULARY))
    assert tokenizer.vocab_size == 384  # padded to a multiple of 128
    assert tokenizer.special == SpecialIds(vocab_size=384)


@pytest.mark.parametrize("missing", ["<mask>", "<s>"])
def test_tokenizer_without_mask_or_bos_is_rejected(documents, missing, tmp_path):
    special = [piece for piece in SPECIAL if piece != missing]
    path = tmp_path / "tokenizer.json"
    path.write_text(make_tokenizer_json(documents[:50], special))
    with pytest.raises(UserError, match=f"tokenizer.json: no special token {missing}"):
        load_tokenizer(str(path))


def test_other_missing_special_tokens_are_added(documents):
    tokenizer = JsonTokenizer(make_tokenizer_json(documents[:50], ["<mask>", "<s>"]).encode())
    assert sorted(tokenizer.external_ids_V[[0, 1, 3]]) == [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
    assert (tokenizer.external_ids_V[5:RESERVED_IDS] == -1).all()
    assert tokenizer.piece(3) == "</s>"
    assert "</s>" in json.loads(tokenizer.file())["added_tokens"][-1]["content"]


def test_more_special_tokens_than_reserved_ids():
    external_ids_V = external_ids(
        {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 50}, [0, 1, 2, 3, *range(20, 51)], range(60)
    )
    assert external_ids_V[:RESERVED_IDS].tolist() == [0, 1, 2, 3, 50, *range(20, 31)]
    assert sorted(external_ids_V[external_ids_V >= 0]) == list(range(60))


@pytest.mark.parametrize("content", [b"{}", b'{"version": "1.0"}', b"{\xff", b" {not json"])
def test_a_damaged_file_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_sentencepiece_model_exported_as_json_encodes_identically(corpus):
    ours = corpus.tokenizer()
    theirs = JsonTokenizer(to_json(ours).encode())
    assert theirs.vocab_size == ours.vocab_size
    np.testing.assert_array_equal(theirs.external_ids_V, ours.external_ids_V)
    np.testing.assert_array_equal(theirs.token_bytes(), ours.token_bytes())
    assert theirs.encode(DIFFICULT) == ours.encode(DIFFICULT)
    assert [theirs.piece(i) for i in range(300)] == [ours.piece(i).replace("\u2581", " ") for i in range(300)]


@pytest.mark.parametrize(
    "options", [{}, PLAIN, PLAIN | {"model_type": "bpe", "byte_fallback": False, "vocab_size": 60}]
)
def test_sentencepiece_model_that_json_cannot_represent_is_rejected(options):
    with pytest.raises(UserError, match="cannot be converted to an equivalent tokenizer.json"):
        to_json(custom_model(random_lines("abcdef "), **options))


NFC, STRIP = {"type": "NFC"}, {"type": "Strip", "strip_left": True, "strip_right": True}


@pytest.mark.parametrize("normalizers", [(NFC,), (STRIP,), ADDING])
def test_only_files_without_a_normalizer_are_lossless(tokenizer, tokenizer_json, normalizers):
    assert tokenizer.lossless
    assert not JsonTokenizer(with_normalizers(tokenizer_json, *normalizers).encode()).lossless


def test_files_that_add_spaces_or_lack_characters_are_not_lossless(tokenizer_json):
    content = json.loads(tokenizer_json)
    content["pre_tokenizer"]["add_prefix_space"] = True
    assert not JsonTokenizer(json.dumps(content).encode()).lossless
    content = json.loads(tokenizer_json)
    lost = content["model"]["vocab"].pop("\u00f4")  # the byte that begins U+100000 and above
    content["model"]["vocab"]["filler"] = lost
    assert not JsonTokenizer(json.dumps(content).encode()).lossless


def test_a_file_that_cannot_spell_unknown_characters_is_not_lossless():
    vocab = {piece: i for i, piece in enumerate([*SPECIAL_PIECES.values(), "a"])}
    content = {
        "added_tokens": [added_token(i, piece) for i, piece in enumerate(SPECIAL_PIECES.values())],
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "nowhere"},
    }
    tokenizer = JsonTokenizer(json.dumps(content).encode())
    assert not tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode(["a"])[0]) == "a"
    with pytest.raises(UserError, match="cannot encode a text .*unk_token"):
        tokenizer.encode(["b"])


def prefixing(tokenizer_json: str, how: str) -> JsonTokenizer:
    """Returns the tokenizer with a part that prepends a space to a text."""
    content = json.loads(tokenizer_json)
    if how == "normalizer":
        content = json.loads(with_normalizers(tokenizer_json, ADDING[0], STRIP, ADDING[0]))
    elif how == "pre-tokenizer":
        content["pre_tokenizer"]["add_prefix_space"] = True
    else:
        metaspace = {"type": "Metaspace", "replacement": " ", "prepend_scheme": how, "split": False}
        content["pre_tokenizer"] = {
            "type": "Sequence", "pretokenizers": [metaspace, content["pre_tokenizer"]]
        }  # fmt: skip
    return JsonTokenizer(json.dumps(content).encode())


@pytest.mark.parametrize("how", ["normalizer", "pre-tokenizer", "always", "first"])
def test_no_space_is_prepended_inside_a_text(tokenizer, tokenizer_json, how):
    other = prefixing(tokenizer_json, how)
    assert other.encode(["def"]) == tokenizer.encode([" def"])
    for text in ("def", "  def ", "\n"):
        assert other.encode([text], inside=True) == tokenizer.encode([text])


@pytest.mark.parametrize("how", ["normalizer", "pre-tokenizer", "always", "first"])
def test_no_space_is_added_after_masks_of_a_prompt(tokenizer, tokenizer_json, how):
    tokens = encode_prompt(prefixing(tokenizer_json, how), "def<mask:2>(self)<mask> return")
    a, b, c = tokenizer.encode([" def", "(self)", " return"])
    assert tokens == [2, *a, 4, 4, *b, 4, *c]


@pytest.mark.parametrize("metaspace", [None, "first", "always"])
def test_spaces_between_masks_are_decoded(metaspace):
    """With tokenizers like Llama's, whose decoder removes the space that their encoder prepends."""
    letters = [*"abc", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
    space, byte = (
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
    )
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    put = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": metaspace, "split": False}
    content = {
        "added_tokens": [added_token(i, piece) for i, piece in enumerate(SPECIAL_PIECES.values())],
        "normalizer": None,
        "pre_tokenizer": put,
        "decoder": {**put, "type": "Metaspace"},
        "model": {
            "type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": [],
            "vocab": {piece: i for i, piece in enumerate([*SPECIAL_PIECES.values(), *letters])},
        },
    }  # fmt: skip
    if metaspace is None:
        prepend = {"type": "Prepend", "prepend": "\u2581"}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        content["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
        content["pre_tokenizer"] = None
        content["decoder"] = {"type": "Sequence", "decoders": [space, byte, {"type": "Fuse"}, strip]}
    tokenizer = JsonTokenizer(json.dumps(content).encode())
    assert show(tokenizer, encode_prompt(tokenizer, "a b<mask> c <mask>c")) == "a b\u2591 c \u2591c"
    assert tokenizer.decode(tokenizer.encode(["a b"])[0]) == "a b"
    assert tokenizer.decode(tokenizer.encode([" b"], inside=True)[0], inside=True) == " b"


def test_a_corpus_can_be_prepared_with_it(jsonl, tokenizer_json, documents, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    recipe = Recipe(input=str(jsonl), tokenizer=str(tmp_path / "tokenizer.json"), valid_fraction=0.05)
    build(recipe, str(tmp_path / "corpus"), workers=1, quiet=True)
    corpus = Corpus(str(tmp_path / "corpus"))
    tokenizer = corpus.tokenizer()
    read = [tokens for split in ("train", "valid") for tokens in read_all(corpus.documents(split))]
    assert sorted(tokenizer.decode(tokens) for tokens in read) == sorted(set(documents))
    assert all((tokens[0], tokens[-1]) == (2, 3) for tokens in read)


def read_all(documents):
    return documents.read(range(len(documents)))
