"""SentencePiece tokenizers: round trips, reserved ids and token sizes."""

import io
import random

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from dualsm.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer
from dualsm.data.tokenizer import RESERVED_IDS
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.data.tokenizer_json import JsonTokenizer
from dualsm.exchange.tokenizer_export import to_json
from dualsm.process.errors import UserError

DIFFICULT = [
    "plain words",
    "  leading and trailing  ",
    "tabs\tand\nnewlines\r\n",
    "emoji 🙂👩‍👩‍👧 and accents éü",
    "controls \x00\x01\x1f\x7f",
    "the piece mark ▁ itself",
    "<s> </s> <mask> <pad> as text",
    "中文字符",
]


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.tokenizer()


def test_text_round_trips(tokenizer):
    for text, tokens in zip(DIFFICULT, tokenizer.encode(DIFFICULT), strict=True):
        assert tokenizer.decode(tokens) == text


def test_text_is_never_encoded_as_reserved_ids(tokenizer):
    for tokens in tokenizer.encode(DIFFICULT):
        assert min(tokens) >= RESERVED_IDS


def test_reserved_ids_have_special_pieces(tokenizer):
    special = tokenizer.special
    assert [tokenizer.piece(i) for i in range(6)] == [
        "<pad>",
        "<unk>",
        "<s>",
        "</s>",
        "<mask>",
        "<reserved_5>",
    ]
    assert (special.pad, special.unk, special.bos, special.eos, special.mask) == (0, 1, 2, 3, 4)
    assert tokenizer.decode([special.bos, special.mask, special.eos]) == ""


def test_token_bytes_add_up_to_the_size_of_the_text(tokenizer):
    sizes_V = tokenizer.token_bytes()
    assert not sizes_V[:RESERVED_IDS].any()
    for text, tokens in zip(DIFFICULT, tokenizer.encode(DIFFICULT), strict=True):
        assert sizes_V[np.array(tokens)].sum() == len(text.encode())


def test_training_is_deterministic(documents):
    assert train_tokenizer(documents[:100], 384).model == train_tokenizer(documents[:100], 384).model


ALPHABETS = {
    "latin": "abcdefghijklmnopqrstuvwxyzäéßABC .,\n",
    "han": "".join(map(chr, range(0x4E00, 0x4E80))),  # no spaces
    "arabic": "".join(map(chr, range(0x621, 0x64B))) + "\u064b\u0651 \u060c",
    "emoji": "🙂🙃😀🎉👩👧\u200d\ufe0f🏽🇩🇪",
    "code": "abcdefi_=()[]{}:#'\"\\ \n\t0123",
}
ODD = "\u2581 \0\ufffd\u2028\r\x85\ufeff\U0010ffff<mask></s>"


def random_lines(alphabet, lines=300, size=60):
    rng = random.Random(0)
    return ["".join(rng.choice(alphabet) for _ in range(size)) for _ in range(lines)]


@pytest.fixture(scope="module")
def by_script():
    return {name: train_tokenizer(random_lines(letters), 512) for name, letters in ALPHABETS.items()}


def test_random_strings_round_trip_with_tokenizers_of_five_scripts(by_script):
    sizes = {name: tokenizer.token_bytes() for name, tokenizer in by_script.items()}
    exported = {name: JsonTokenizer(to_json(tokenizer).encode()) for name, tokenizer in by_script.items()}
    seen = 0

    @settings(max_examples=10_000, deadline=None, derandomize=True, database=None)
    @given(st.one_of(st.text(), *(st.text(letters + ODD) for letters in ALPHABETS.values())))
    def check(text):
        nonlocal seen
        seen += 1
        for name, tokenizer in by_script.items():
            tokens = tokenizer.encode([text])[0]
            assert tokenizer.decode(tokens) == text
            assert sizes[name][tokens].sum() == len(text.encode())
            assert exported[name].encode([text])[0] == tokens

    check()
    assert seen >= 10_000


def test_a_vocabulary_trained_without_spaces_has_a_piece_for_spaces(by_script):
    tokenizer = by_script["han"]
    assert [tokenizer.piece(token) for token in tokenizer.encode(["丁 丂"])[0]] == ["丁", "▁", "丂"]


def custom_model(texts, **options):
    """Trains a SentencePiece model with the special ids but with options other than `train_tokenizer`'s."""
    output = io.BytesIO()
    settings = {
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "pad_piece": "<pad>",
        "control_symbols": ["<mask>"] + [f"<reserved_{i}>" for i in range(5, RESERVED_IDS)],
        "minloglevel": 2,
    }  # fmt: skip
    spm.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=output, **(settings | options))
    return SentencePieceTokenizer(output.getvalue())


PLAIN = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}


def test_a_vocabulary_without_a_piece_for_spaces_encodes_them_as_bytes():
    """Earlier versions trained such vocabularies."""
    tokenizer = custom_model(random_lines(ALPHABETS["han"]), model_type="bpe", **PLAIN)
    assert "▁" not in [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    text = " 丁 ▁ 丂"
    tokens = tokenizer.encode([text])[0]
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_bytes()[tokens].sum() == len(text.encode())
    assert JsonTokenizer(to_json(tokenizer).encode()).encode([text])[0] == tokens


@pytest.mark.parametrize(
    ("options", "lossless"),
    [
        ({}, True),
        ({"add_dummy_prefix": True}, False),
        ({"remove_extra_whitespaces": True}, False),
        ({"normalization_rule_name": "nfkc"}, False),
        ({"byte_fallback": False, "vocab_size": 60}, False),
    ],
)
def test_only_models_without_normalization_are_lossless(options, lossless):
    assert custom_model(random_lines(ALPHABETS["latin"]), **(PLAIN | options)).lossless is lossless


def test_no_space_is_prepended_to_text_inside_other_text():
    tokenizer = custom_model(random_lines(ALPHABETS["latin"]), add_dummy_prefix=True)
    assert tokenizer.piece(tokenizer.encode(["b"])[0][0]).startswith("▁")
    for text in ("b", "  b "):
        pieces = [tokenizer.piece(token) for token in tokenizer.encode([text], inside=True)[0]]
        assert "".join(pieces) == text.replace(" ", "▁")


def test_models_without_the_special_pieces_raise(tmp_path):
    output = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to train on"] * 10),
        model_writer=output,
        vocab_size=17,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="<pad>|<mask>"):
        SentencePieceTokenizer(output.getvalue())
    with pytest.raises(UserError, match="not a SentencePiece model"):
        SentencePieceTokenizer(b"something else")
    with pytest.raises(UserError, match="nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
