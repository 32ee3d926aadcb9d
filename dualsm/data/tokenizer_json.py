"""Hugging Face `tokenizer.json` files as dualsm tokenizers.

Special tokens of a `tokenizer.json` can have any ids. The ids are renumbered when the file is loaded: the ids
below `RESERVED_IDS` are the special ids of every tokenizer, so no other code needs to know which ids are
special. `dualsm.exchange` permutes imported and exported weights accordingly.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence

import numpy as np

from dualsm.data.special_roles import MAX_ID, SpecialRoles
from dualsm.data.tokenizer import RESERVED_IDS, SPECIAL_PIECES, SpecialIds, Tokenizer, check_not_negative
from dualsm.process.errors import UserError

_REQUIRED = ("bos", "mask")  # without these, only the causal objective works
_NESTED = ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers", "decoder", "decoders")
_IDENTITY = {"type": "Sequence", "normalizers": [], "decoders": []}  # as a normalizer or decoder
_VOCAB_MULTIPLE = 128  # vocabularies are padded to a multiple of this
# Texts that normalizers, pre-tokenizers and decoders are most likely to change.
_PROBES = (
    " a  b \t\r\n c \u3000\u00a0\u200b\u2581 </s> ## \0\x7f\x85\ufeff",
    "Aa \u00e9 e\u0301 \uff21 \ufb01 \u0130 \u4e00 \U0001f642\u200d \U0010ffff",
    "do n't , ok . `` ''",
)


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` with renumbered ids.

    Attributes:
      pieces: token of each special role.
      num_ids: ids of the weights that the file was adapted to, see `SpecialRoles`; 0 for other files.
      unused_ids: ids that occur neither in text nor at its end, see `SpecialRoles.unused_ids`.
    """

    def __init__(self, model: bytes):
        """Loads a tokenizer.

        Args:
          model: content of the `tokenizer.json`.

        Raises:
          UserError: if the content is not a tokenizer, or if `<mask>` or `<s>` is missing and the file does
            not assign their roles to other tokens, see `SpecialRoles`.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("a tokenizer.json needs the extra: pip install 'dualsm[exchange]'") from error
        self.model = model
        try:
            content = json.loads(model)
            roles = SpecialRoles.pop_from(content)
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
            self._inside = tokenizers.Tokenizer.from_str(json.dumps(_without_edges(content)))
            self._types = _types(content)
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"not a tokenizer.json ({error})") from error
        self.pieces = roles.pieces
        self.num_ids = roles.num_ids
        for name in () if roles.num_ids else _REQUIRED:
            piece = self.pieces[name]
            if self._tokenizer.token_to_id(piece) is None:
                raise UserError(f"no special token {piece}; add it to the file as a special token")
        own_ids = set(self._tokenizer.get_vocab().values())
        for tokenizer in (self._tokenizer, self._inside):
            tokenizer.add_special_tokens(list(dict.fromkeys(self.pieces.values())))  # existing ones keep ids
            tokenizer.no_padding()
            tokenizer.no_truncation()
            tokenizer.encode_special_tokens = True  # "<mask>" in a text is text

        named = {name: self._tokenizer.token_to_id(piece) for name, piece in self.pieces.items()}
        special_ids = {}
        if named["bos"] == named["eos"]:  # one token, so one id
            del named["bos"]
            special_ids["bos"] = SpecialIds().eos
        added = self._tokenizer.get_added_tokens_decoder()
        special = [token for token in sorted(added) if added[token].special]
        ids = sorted({*self._tokenizer.get_vocab().values(), *range(roles.num_ids)})
        if ids[-1] > MAX_ID:
            raise UserError(f"its largest id is {ids[-1]}; ids above {MAX_ID} are not supported")
        self.external_ids_V = external_ids(named, special, ids)
        self.vocab_size = len(self.external_ids_V)
        self.special = SpecialIds(vocab_size=self.vocab_size, **special_ids)
        self.unused_ids = roles.unused_ids(self.external_ids_V, own_ids)
        known = np.flatnonzero(self.external_ids_V >= 0)
        self._internal_ids = np.full(self.external_ids_V.max() + 1, self.special.unk)
        self._internal_ids[self.external_ids_V[known]] = known
        # A normalizer can change texts that the probes do not cover.
        self.lossless = content.get("normalizer") is None and self._round_trips_probes()

    def _round_trips_probes(self) -> bool:
        """Returns True if decoding returns every probe unchanged."""
        try:
            return all(self.decode(self.encode([text])[0]) == text for text in _PROBES)
        except UserError:  # a model without bytes and `<unk>` cannot encode every character
            return False

    def encode(self, texts: Sequence[str], inside: bool = False) -> list[list[int]]:
        tokenizer = self._inside if inside else self._tokenizer
        try:
            encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(
                f"the tokenizer.json cannot encode a text ({error}); add an `unk_token` from its vocabulary"
            ) from error
        return [self._internal_ids[encoding.ids].tolist() if encoding.ids else [] for encoding in encodings]

    def decode(self, tokens: Iterable[int], inside: bool = False) -> str:
        tokenizer = self._inside if inside else self._tokenizer
        external = [int(self.external_ids_V[token]) for token in tokens if token >= RESERVED_IDS]
        return tokenizer.decode([t for t in external if t >= 0], skip_special_tokens=False)

    def piece(self, token: int) -> str:
        external = int(self.external_ids_V[token])
        return (self._tokenizer.id_to_token(external) if external >= 0 else None) or f"<reserved_{token}>"

    def token_bytes(self) -> np.ndarray:
        added = self._tokenizer.get_added_tokens_decoder()
        sizes_V = np.zeros(self.vocab_size, np.int32)
        for token in range(RESERVED_IDS, self.vocab_size):
            external = int(self.external_ids_V[token])
            if external in added:
                content = "" if added[external].special else added[external].content
                sizes_V[token] = len(content.encode("utf-8"))
            elif external >= 0:
                sizes_V[token] = _piece_bytes(self._tokenizer.id_to_token(external) or "", self._types)
        return sizes_V

    def from_external_ids(self, external_S: np.ndarray) -> np.ndarray:
        return self._internal_ids[check_not_negative(external_S)]

    def without_added(self) -> JsonTokenizer:
        """Returns the tokenizer without the tokens whose ids the weights lack, as it was imported."""
        import tokenizers

        content = json.loads(self.file())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < self.num_ids]
        found = copy.copy(self)
        found._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        found.external_ids_V = np.where(self.external_ids_V < self.num_ids, self.external_ids_V, -1)
        return found

    def file(self) -> str:
        """Returns the `tokenizer.json` with external ids; missing special tokens are appended."""
        return self._tokenizer.to_str()


def external_ids(named: dict[str, int], special: list[int], ids: list[int]) -> np.ndarray:
    """Numbers the ids of a tokenizer file: special ids first, then text ids, padded to a multiple of 128.

    Args:
      named: ids of the special pieces in the file, by field of `SpecialIds`.
      special: ids of all special tokens in the file. Tokens not in `named` get free reserved ids, as long as
        there are any; the others become text ids.
      ids: all ids in the file, ascending.

    Returns:
      external_ids_V, int32; see `Tokenizer`.
    """
    reserved = np.full(RESERVED_IDS, -1, np.int32)
    for name, token in named.items():
        reserved[getattr(SpecialIds(), name)] = token
    first = len(SPECIAL_PIECES)
    unnamed = [token for token in special if token not in named.values()][: RESERVED_IDS - first]
    reserved[first : first + len(unnamed)] = unnamed
    taken = {*named.values(), *unnamed}
    text = [token for token in ids if token not in taken]
    padding = [-1] * (-(RESERVED_IDS + len(text)) % _VOCAB_MULTIPLE)
    return np.concatenate([reserved, np.array([*text, *padding], np.int32)])


def _without_edges(node):
    """Returns the content of the file without steps that add or strip whitespace at the edges of a text."""
    if isinstance(node, list):
        return [_without_edges(item) for item in node]
    if not isinstance(node, dict):
        return node
    inner = {key: _without_edges(node[key]) if key in _NESTED else value for key, value in node.items()}
    if node.get("type") in ("Prepend", "Strip"):
        return _IDENTITY
    if "add_prefix_space" in node:
        inner["add_prefix_space"] = False
    if "prepend_scheme" in node:
        inner["prepend_scheme"] = "never"
    return inner


def _types(node) -> set[str]:
    """Returns the type names of all components of a tokenizer."""
    if isinstance(node, list):
        return set().union(*map(_types, node))
    if not isinstance(node, dict):
        return set()
    components = (_types(node.get(key)) for key in ("pre_tokenizer", "decoder", "pretokenizers", "decoders"))
    return {str(node.get("type"))}.union(*components)


def _piece_bytes(piece: str, types: set[str]) -> int:
    """Returns the number of text bytes of a piece, given the component types of its tokenizer."""
    if "ByteLevel" in types:
        return len(piece)  # one printable character per byte
    if "ByteFallback" in types and len(piece) == 6 and piece.startswith("<0x"):
        return 1
    if "WordPiece" in types:
        piece = piece.removeprefix("##")
    return len(piece.replace("\u2581", " ").encode("utf-8"))
