"""Exports tokenizers as a Hugging Face `tokenizer.json`, including SentencePiece models.

The conversion of SentencePiece models differs from general converters in two ways. Pieces contain spaces
instead of U+2581, so that U+2581 in a text is encoded as bytes, as dualsm does. Special pieces in a text are
encoded as plain text unless the caller asks otherwise.
"""

from __future__ import annotations

import json

import numpy as np
from sentencepiece import SentencePieceProcessor

from dualsm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from dualsm.data.special_roles import KEY
from dualsm.data.tokenizer import RESERVED_IDS, SPECIAL_PIECES, Tokenizer
from dualsm.data.tokenizer_json import JsonTokenizer
from dualsm.exchange.weights_source import read_source
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun

_SPACE_MARK = "\u2581"


def special_pieces(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the tokens of the special roles in the tokenizer's file."""
    return tokenizer.pieces if isinstance(tokenizer, JsonTokenizer) else SPECIAL_PIECES


def external_special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Returns the external ids of the named special tokens; None for those without."""
    found = {name: int(tokenizer.external_ids_V[getattr(tokenizer.special, name)]) for name in SPECIAL_PIECES}
    return {name: None if token < 0 else token for name, token in found.items()}


def exported_tokenizer(run: TrainedRun) -> Tokenizer:
    """Returns the tokenizer of an export, in which an untrained run has no added tokens."""
    tokenizer = run.tokenizer
    added = isinstance(tokenizer, JsonTokenizer) and tokenizer.num_ids
    averaged_steps = read_source(run).get("steps", ())  # a mean of checkpoints is at step 0 too
    untrained = not run.step and not any(averaged_steps)
    return tokenizer.without_added() if added and untrained else tokenizer


def has_standard_file(tokenizer: Tokenizer) -> bool:
    """Returns True if the file of a tokenizer is a standard `tokenizer.json` with all of its tokens."""
    if not isinstance(tokenizer, JsonTokenizer):
        return False
    content, loaded = json.loads(tokenizer.model), json.loads(tokenizer.file())
    return KEY not in content and len(content.get("added_tokens") or ()) == len(loaded["added_tokens"])


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Returns the text of `tokenizer.json`; encoding with it prepends `<s>`, as in training.

    Raises:
      UserError: if it is a SentencePiece model that cannot be converted.
    """
    if not isinstance(tokenizer, JsonTokenizer):
        return to_json(tokenizer)
    content = json.loads(tokenizer.file())
    bos = external_special_ids(tokenizer)["bos"]
    if bos is not None:
        content["post_processor"] = prepend_bos(bos, special_pieces(tokenizer)["bos"])
    return json.dumps(content, ensure_ascii=False)


def to_json(tokenizer: SentencePieceTokenizer) -> str:
    """Converts a SentencePiece model to the text of a `tokenizer.json`.

    Raises:
      UserError: if the result would encode text differently, as for models that have a normalizer or are not
        BPE models.
    """
    content = _convert(tokenizer)
    # Check on a text of all pieces in a shuffled order, which includes combinations that form no words.
    order = np.random.default_rng(0).permutation(np.arange(RESERVED_IDS, tokenizer.vocab_size))
    text = tokenizer.decode(order)
    if not tokenizer.lossless or JsonTokenizer(content.encode()).encode([text]) != tokenizer.encode([text]):
        raise UserError(
            "this SentencePiece model cannot be converted to an equivalent tokenizer.json; use a BPE model "
            "without a normalizer, such as `python -m dualsm.prepare --vocab_size` trains"
        )
    return content


def _convert(tokenizer: SentencePieceTokenizer) -> str:
    """Returns the `tokenizer.json` of a BPE model without a normalizer."""
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
            "post_processor": prepend_bos(tokenizer.special.bos),
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
    """Returns the merges of a BPE model: all pairs of pieces that form a piece, highest score first.

    Args:
      scores: score of each piece that is not special.
    """
    found = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        found += [(a, b) for a, b in pairs if a in scores and b in scores]
    return found


def prepend_bos(bos: int, piece: str = SPECIAL_PIECES["bos"]) -> dict:
    """Returns a post-processor that prepends `<s>`, or another `piece`, as training documents have it."""
    start, a, b = ({"SpecialToken": {"id": piece, "type_id": 0}}, _sequence("A", 0), _sequence("B", 1))
    return {
        "type": "TemplateProcessing",
        "single": [start, a],
        "pair": [start, a, b],
        "special_tokens": {piece: {"id": piece, "ids": [bos], "tokens": [piece]}},
    }


def _sequence(name: str, type_id: int) -> dict:
    return {"Sequence": {"id": name, "type_id": type_id}}


def added_token(token: int, piece: str) -> dict:
    """Returns the `added_tokens` entry of a special token."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": piece, **flags, "special": True}
