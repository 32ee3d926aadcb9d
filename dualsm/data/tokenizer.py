"""The interface of tokenizers, and the special ids that all of them share.

Implementations: SentencePiece models (sentencepiece_tokenizer.py) and Hugging Face `tokenizer.json` files
(tokenizer_json.py). `load_tokenizer` (tokenizer_file.py) reads either.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

RESERVED_IDS = 16  # ids below this never represent text and are never masked
SPECIAL_PIECES = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>", "mask": "<mask>"}


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The special ids, all below `RESERVED_IDS`, and the vocabulary size.

    Attributes:
      pad, unk, bos, eos, mask: have a piece in every tokenizer; see `SPECIAL_PIECES`.
      vocab_size: number of ids, text ids included; 0 if unknown.

    The ids from 5 to `RESERVED_IDS` - 1, the pieces `<reserved_5>` to `<reserved_15>`, are reserved for the
    mode tokens of objectives; see dualsm/objectives/registry.py.
    """

    pad: int = 0
    unk: int = 1
    bos: int = 2
    eos: int = 3
    mask: int = 4
    vocab_size: int = 0

    def as_dict(self) -> dict[str, int]:
        """Returns the special ids by name."""
        ids = dataclasses.asdict(self)
        del ids["vocab_size"]
        return ids


class Tokenizer(abc.ABC):
    """Converts text to token ids and back; ids below `RESERVED_IDS` are reserved for special tokens.

    Attributes:
      model: content of the tokenizer file, byte for byte.
      vocab_size: number of ids.
      special: the special ids.
      external_ids_V: int32; maps dualsm's ids to ids in the tokenizer file; -1 for ids that it lacks.
      lossless: True if the file guarantees `decode(encode([text])[0]) == text` for every text.
    """

    model: bytes
    vocab_size: int
    special: SpecialIds
    external_ids_V: np.ndarray
    lossless: bool

    @abc.abstractmethod
    def encode(self, texts: Sequence[str], inside: bool = False) -> list[list[int]]:
        """Returns the token ids of each text, without `<s>` and `</s>`. Text never becomes a special id.

        Args:
          texts: any text.
          inside: the texts continue other text. The tokenizer then neither prepends a space nor strips
            whitespace at their edges.
        """

    @abc.abstractmethod
    def decode(self, tokens: Iterable[int], inside: bool = False) -> str:
        """Returns the text of token ids, without special ids.

        Args:
          tokens: token ids.
          inside: the tokens continue other text, so a leading space belongs to the text.
        """

    @abc.abstractmethod
    def piece(self, token: int) -> str:
        """Returns the printable form of one token, special ids included."""

    @abc.abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Returns the number of text bytes per id, int32 of shape [V]; 0 for special ids.

        The sizes of a text's tokens add up to the size of the text for lossless tokenizers only.
        """

    @abc.abstractmethod
    def from_external_ids(self, external_S: np.ndarray) -> np.ndarray:
        """Converts ids of the tokenizer file to dualsm's ids.

        Raises:
          IndexError: if the file does not have one of the ids.
        """

    def sha256(self) -> str:
        """Returns the hash of the tokenizer file, in hexadecimal."""
        return hashlib.sha256(self.model).hexdigest()


def check_not_negative(ids: np.ndarray) -> np.ndarray:
    """Returns `ids`. Raises `IndexError` for negative ids, which would index from the end."""
    if len(ids) and ids.min() < 0:
        raise IndexError(f"negative id {ids.min()}")
    return ids
