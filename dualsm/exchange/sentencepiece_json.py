"""A SentencePiece tokenizer trained here, written as a Hugging Face `tokenizer.json` that encodes alike.

Two things are done otherwise than in converters made for any model. Pieces are spelled with real spaces
instead of U+2581, so that a U+2581 in a text is what it is in ours: unknown, and so spelled in bytes. And the
special pieces are never read out of a text unless that is asked for.
"""

from __future__ import annotations

import json

import numpy as np
from sentencepiece import SentencePieceProcessor

from dualsm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from dualsm.data.tokenizer import RESERVED_IDS, SPECIAL_PIECES
from dualsm.data.tokenizer_json import JsonTokenizer
from dualsm.process.errors import UserError

_SPACE_MARK = "\u2581"


def to_json(tokenizer: SentencePieceTokenizer) -> str:
    """Returns the text of the `tokenizer.json`.

    Raises:
      UserError: when the file would encode text in another way, as for models with a normaliser or of
        another type than BPE.
    """
    content = _convert(tokenizer)
    # All pieces, in a fixed order other than their own, so that pieces meet that are no words together.
    order = np.random.default_rng(0).permutation(np.arange(RESERVED_IDS, tokenizer.vocab_size))
    text = tokenizer.decode(order)
    if not tokenizer.lossless or JsonTokenizer(content.encode()).encode([text]) != tokenizer.encode([text]):
        raise UserError(
            "this SentencePiece model cannot be written as a tokenizer.json that encodes alike; export "
            "supports BPE models without a normaliser, as `python -m dualsm.prepare --vocab_size` trains them"
        )
    return content


def _convert(tokenizer: SentencePieceTokenizer) -> str:
    """Returns the `tokenizer.json` of a BPE model without a normaliser."""
    model = SentencePieceProcessor()
    model.LoadFromSerializedProto(tokenizer.model)
    pieces = [model.id_to_piece(i).replace(_SPACE_MARK, " ") for i in range(tokenizer.vocab_size)]
    special = [i for i in range(tokenizer.vocab_size) if model.is_control(i) or model.is_unknown(i)]
    text = {
        piece: model.get_score(i)
        for i, piece in enumerate(pieces)
        if not (i in special or model.is_byte(i) or model.is_unused(i))
    }
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [added_token(i, pieces[i]) for i in special],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": begin_with_bos(tokenizer.special.bos),
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": {piece: i for i, piece in enumerate(pieces)},
                "merges": merges(text),
            },
        },
        ensure_ascii=False,
    )


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, best score first, as SentencePiece merges them.

    Args:
      scores: of all pieces of text.
    """
    found = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        found += [(a, b) for a, b in pairs if a in scores and b in scores]
    return found


def begin_with_bos(bos: int) -> dict:
    """A post-processor that puts `<s>` in front, as documents have it in training."""
    piece = SPECIAL_PIECES["bos"]
    start, a, b = ({"SpecialToken": {"id": piece, "type_id": 0}}, _sequence("A", 0), _sequence("B", 1))
    return {
        "type": "TemplateProcessing",
        "single": [start, a],
        "pair": [start, a, b],
        "special_tokens": {piece: {"id": piece, "ids": [bos], "tokens": [piece]}},
    }


def _sequence(name: str, kind: int) -> dict:
    return {"Sequence": {"id": name, "type_id": kind}}


def added_token(token: int, piece: str) -> dict:
    """Returns the entry of a special token."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": piece, **flags, "special": True}
