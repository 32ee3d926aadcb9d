"""Hugging Face `tokenizer.json` files as tokenizers of dualsm.

Their special tokens may have any ids. The ids are renumbered here, at the border, so that inside dualsm the
ids below `RESERVED_IDS` are the special ones whatever the tokenizer: nothing else has to ask which ids are
special. Weights that come in or go out are permuted accordingly (dualsm/exchange/vocabulary.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np

from dualsm.data.tokenizer import RESERVED_IDS, SPECIAL_PIECES, SpecialIds, Tokenizer, natural
from dualsm.process.errors import UserError

_REQUIRED = ("bos", "mask")  # without these no objective but the causal one would mean anything
_HIGHEST_ID = (1 << 24) - 1  # there are arrays of that length
_NESTED = ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers", "decoder", "decoders")
_NOTHING = {"type": "Sequence", "normalizers": [], "decoders": []}  # as a normaliser or decoder
_MULTIPLE = 128  # the vocabulary is filled up to one, as those trained here are


_PROBES = (
    " a  b \t\r\n c \u3000\u00a0\u200b\u2581 </s> ## \0\x7f\x85\ufeff",
    "Aa \u00e9 e\u0301 \uff21 \ufb01 \u0130 \u4e00 \U0001f642\u200d \U0010ffff",
    "do n't , ok . `` ''",
)  # what normalisers, pre-tokenizers and decoders change most often


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` with its ids renumbered."""

    def __init__(self, model: bytes):
        """Raises `UserError` for what is no tokenizer, and when `<mask>` or `<s>` is missing."""
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("a tokenizer.json needs the extra: pip install 'dualsm[exchange]'") from error
        self.model = model
        try:
            content = json.loads(model)
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
            self._inside = tokenizers.Tokenizer.from_str(json.dumps(_without_edges(content)))
            self._kinds = _kinds(content)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"not a tokenizer.json ({error})") from error
        for name in _REQUIRED:
            if self._tokenizer.token_to_id(SPECIAL_PIECES[name]) is None:
                raise UserError(f"it has no {SPECIAL_PIECES[name]}; add it to the file as a special token")
        for tokenizer in (self._tokenizer, self._inside):
            tokenizer.add_special_tokens(list(SPECIAL_PIECES.values()))  # those there are keep their ids
            tokenizer.no_padding()
            tokenizer.no_truncation()
            tokenizer.encode_special_tokens = True  # "<mask>" in a text is text

        named = {name: self._tokenizer.token_to_id(piece) for name, piece in SPECIAL_PIECES.items()}
        added = self._tokenizer.get_added_tokens_decoder()
        special = [own for own in sorted(added) if added[own].special]
        ids = sorted(self._tokenizer.get_vocab().values())
        if ids[-1] > _HIGHEST_ID:
            raise UserError(f"it has the id {ids[-1]}; ids above {_HIGHEST_ID} are not supported")
        self.external_ids_V = own_ids(named, special, ids)
        self.vocab_size = len(self.external_ids_V)
        self.special = SpecialIds(vocab_size=self.vocab_size)
        known = np.flatnonzero(self.external_ids_V >= 0)
        self._ours = np.full(self.external_ids_V.max() + 1, self.special.unk)
        self._ours[self.external_ids_V[known]] = known
        # Normalisers may change texts that no probe has, so that a file with one guarantees nothing.
        self.lossless = content.get("normalizer") is None and self._returns_probes()

    def _returns_probes(self) -> bool:
        """Returns True when texts with difficult characters come back as they were."""
        try:
            return all(self.decode(self.encode([text])[0]) == text for text in _PROBES)
        except UserError:  # models without bytes and `<unk>` lack characters
            return False

    def encode(self, texts: Sequence[str], inside: bool = False) -> list[list[int]]:
        tokenizer = self._inside if inside else self._tokenizer
        try:
            encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"the tokenizer.json cannot encode a text ({error}); give it an `unk_token` of its vocabulary"
            ) from error
        return [self._ours[encoding.ids].tolist() if encoding.ids else [] for encoding in encodings]

    def decode(self, tokens: Iterable[int], inside: bool = False) -> str:
        tokenizer = self._inside if inside else self._tokenizer
        own = [int(self.external_ids_V[token]) for token in tokens if token >= RESERVED_IDS]
        return tokenizer.decode([t for t in own if t >= 0], skip_special_tokens=False)

    def piece(self, token: int) -> str:
        own = int(self.external_ids_V[token])
        return self._tokenizer.id_to_token(own) if own >= 0 else f"<reserved_{token}>"

    def token_bytes(self) -> np.ndarray:
        added = self._tokenizer.get_added_tokens_decoder()
        sizes_V = np.zeros(self.vocab_size, np.int32)
        for token in range(RESERVED_IDS, self.vocab_size):
            own = int(self.external_ids_V[token])
            if own in added:
                sizes_V[token] = 0 if added[own].special else len(added[own].content.encode("utf-8"))
            elif own >= 0:
                sizes_V[token] = _size(self._tokenizer.id_to_token(own), self._kinds)
        return sizes_V

    def from_own(self, own_S: np.ndarray) -> np.ndarray:
        return self._ours[natural(own_S)]

    def file(self) -> str:
        """The `tokenizer.json`, in its own numbering, with special tokens that it lacked added at its end."""
        return self._tokenizer.to_str()


def own_ids(named: dict[str, int], special: list[int], ids: list[int]) -> np.ndarray:
    """The order in which dualsm numbers a tokenizer's ids.

    Args:
      named: the tokenizer's id of each field of `SpecialIds` that has a piece of its own.
      special: ids of all its special tokens; those not named take the spare reserved ids, while they last.
      ids: all its ids, ascending.

    Returns:
      external_ids_V, int32: the tokenizer's id of each of ours, -1 for ours that it does not know.
    """
    own = np.full(RESERVED_IDS, -1, np.int32)
    for name, token in named.items():
        own[getattr(SpecialIds(), name)] = token
    spare = [token for token in special if token not in named.values()][: RESERVED_IDS - len(named)]
    own[len(named) : len(named) + len(spare)] = spare
    taken = {*named.values(), *spare}
    text = [token for token in ids if token not in taken]
    filling = [-1] * (-(RESERVED_IDS + len(text)) % _MULTIPLE)
    return np.concatenate([own, np.array([*text, *filling], np.int32)])


def _without_edges(node):
    """Returns the file's content without the parts that add or strip whitespace at the edges of a text."""
    if isinstance(node, list):
        return [_without_edges(part) for part in node]
    if not isinstance(node, dict):
        return node
    inner = {key: _without_edges(node[key]) if key in _NESTED else value for key, value in node.items()}
    if node.get("type") in ("Prepend", "Strip"):
        return _NOTHING
    if "add_prefix_space" in node:
        inner["add_prefix_space"] = False
    if "prepend_scheme" in node:
        inner["prepend_scheme"] = "never"
    return inner


def _kinds(node) -> set[str]:
    """The names of all parts a tokenizer is made of."""
    if isinstance(node, list):
        return set().union(*map(_kinds, node))
    if not isinstance(node, dict):
        return set()
    parts = (_kinds(node.get(key)) for key in ("pre_tokenizer", "decoder", "pretokenizers", "decoders"))
    return {str(node.get("type"))}.union(*parts)


def _size(piece: str, kinds: set[str]) -> int:
    """Bytes of text that a piece stands for, by the alphabet its tokenizer spells text in."""
    if "ByteLevel" in kinds:
        return len(piece)  # one printable character a byte
    if "ByteFallback" in kinds and len(piece) == 6 and piece.startswith("<0x"):
        return 1
    if "WordPiece" in kinds:
        piece = piece.removeprefix("##")
    return len(piece.replace("\u2581", " ").encode("utf-8"))
