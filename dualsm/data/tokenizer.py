"""Tokenizers: special ids, what every tokenizer offers, and SentencePiece ones, which can be trained here.

SentencePiece tokenizers trained here are lossless: no normalisation, no dummy prefix, bytes as a fallback, so
that `decode(encode(text)) == text` and bits per byte mean the same for every vocabulary. A Hugging Face
`tokenizer.json` can take their place everywhere, see dualsm/data/tokenizer_json.py.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece as spm
from etils import epath

from dualsm.process.errors import UserError

RESERVED_IDS = 16  # ids below this never stand for text and are never masked
SPECIAL_PIECES = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>", "mask": "<mask>"}
BYTE_PIECES = 256
MINIMUM_VOCABULARY = 384  # the least multiple of 128 above RESERVED_IDS + BYTE_PIECES
_SPACE_MARK = "\u2581"
# Protocol buffers merge a message that is appended: these overwrite `normalizer_spec` fields of a model.
_PLAIN_EDGES = bytes.fromhex("1a04 1800 2000")  # add_dummy_prefix, remove_extra_whitespaces: false
_NO_NORMALISER = bytes.fromhex("1a06 1200 1800 2000")  # and an empty precompiled_charsmap
_PIECE_BYTES = 2000  # text is cut into pieces of about this size to train on


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids with a meaning of their own, all below `RESERVED_IDS`, and the size of the vocabulary.

    Attributes:
      pad, unk, bos, eos, mask: have pieces of their own in every tokenizer.
      hole: stands in place of a missing span, and again before the span itself (span denoising).
      regular, sequential, extreme: mode tokens of the denoisers R, S and X (span denoising).
      rest: mode token of next-all-token prediction.
      ahead2..ahead7: mode tokens of diverse causal prediction at distances 2 to 7; 1 needs none.
      vocabulary: number of ids, text included; 0: unknown.

    The ids from `hole` on are spare in the tokenizer: its pieces `<reserved_5>` to `<reserved_15>`.
    """

    pad: int = 0
    unk: int = 1
    bos: int = 2
    eos: int = 3
    mask: int = 4
    hole: int = 5
    regular: int = 6
    sequential: int = 7
    extreme: int = 8
    rest: int = 9
    ahead2: int = 10
    ahead3: int = 11
    ahead4: int = 12
    ahead5: int = 13
    ahead6: int = 14
    ahead7: int = 15
    vocab_size: int = 0

    def as_dict(self) -> dict[str, int]:
        """The special ids by name."""
        ids = dataclasses.asdict(self)
        del ids["vocab_size"]
        return ids


class Tokenizer(abc.ABC):
    """Text to ids and back, with the ids below `RESERVED_IDS` kept for dualsm's special tokens.

    Attributes:
      model: the tokenizer as a file, byte for byte as it lies in `tokenizer.model`.
      vocabulary: number of ids.
      special: the special ids.
      external_ids_V: int32; the id of each of our ids in the tokenizer's own file, -1 where it has none.
      lossless: the file guarantees `decode(encode([text])[0]) == text` for every text.
    """

    model: bytes
    vocab_size: int
    special: SpecialIds
    external_ids_V: np.ndarray
    lossless: bool

    @staticmethod
    def load(path: str) -> Tokenizer:
        """Reads a SentencePiece model or a `tokenizer.json`, told apart by content.

        Raises:
          UserError: naming the file, when it cannot be read or lacks special tokens.
        """
        from dualsm.data.tokenizer_json import JsonTokenizer

        try:
            model = epath.Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read tokenizer {path}: {error.strerror or error}") from error
        kind = JsonTokenizer if model.lstrip()[:1] == b"{" else SentencePieceTokenizer
        try:
            return kind(model)
        except UserError as error:
            raise UserError(f"tokenizer {path}: {error}") from error

    @abc.abstractmethod
    def encode(self, texts: Sequence[str], inside: bool = False) -> list[list[int]]:
        """Returns the token ids of each text, without `<s>` and `</s>`; text never becomes a special id.

        Args:
          texts: any text.
          inside: the texts continue other text. The tokenizer then does not treat their edges as those of a
            document: it does not prepend a space and does not strip whitespace.
        """

    @abc.abstractmethod
    def decode(self, tokens: Iterable[int], inside: bool = False) -> str:
        """Returns the text of token ids; special ids are left out.

        Args:
          tokens: ids.
          inside: the tokens continue other text, so that a space in front is part of it.
        """

    @abc.abstractmethod
    def piece(self, token: int) -> str:
        """The printable form of one token, special ids included."""

    @abc.abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Returns the bytes of text that each id stands for, int32 of shape [vocabulary]; 0 for special ids.

        Only for lossless tokenizers is their sum the size of the encoded text.
        """

    @abc.abstractmethod
    def from_own(self, own_S: np.ndarray) -> np.ndarray:
        """Our ids of the file's own. Raises `IndexError` for ids that the file does not have."""

    def sha256(self) -> str:
        """Hash of the model, in hexadecimal."""
        return hashlib.sha256(self.model).hexdigest()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with dualsm's special ids."""

    def __init__(self, model: bytes):
        """Raises `UserError` when `model` is no SentencePiece model or lacks the special pieces."""
        self.model = model
        try:
            self._processor = _processor(model)
            self.vocab_size = self._processor.vocab_size()
            pieces = self._processor.id_to_piece(list(range(self.vocab_size)))  # all must be UTF-8
            self._inside = _processor(model + _PLAIN_EDGES)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"not a SentencePiece model ({error})") from error
        self.special = SpecialIds(vocab_size=self.vocab_size)
        for name, piece in SPECIAL_PIECES.items():
            token = getattr(self.special, name)
            if token >= self.vocab_size or pieces[token] != piece:
                raise UserError(
                    f"the tokenizer has no {piece} at id {token}; "
                    "train one with `python -m dualsm.prepare`, without --tokenizer"
                )
        self.external_ids_V = np.arange(self.vocab_size, dtype=np.int32)
        self.lossless = self._is_lossless()
        # SentencePiece spells a space as U+2581. Bytes keep the character itself, and keep spaces where the
        # vocabulary has no U+2581.
        self._as_bytes = re.compile(f"({_SPACE_MARK})" if _SPACE_MARK in pieces else f"([ {_SPACE_MARK}])")

    def _is_lossless(self) -> bool:
        """Returns True for a model that neither normalises text nor lacks a byte."""
        unchanged = _processor(self.model + _NO_NORMALISER).serialized_model_proto()
        has_bytes = sum(self._processor.is_byte(list(range(self.vocab_size)))) == BYTE_PIECES
        return has_bytes and self._processor.serialized_model_proto() == unchanged

    def encode(self, texts: Sequence[str], inside: bool = False) -> list[list[int]]:
        first = self._inside if inside else self._processor
        return [self._encode(text, first) for text in texts]

    def _encode(self, text: str, first: spm.SentencePieceProcessor) -> list[int]:
        start, *others = self._as_bytes.split(text)
        tokens = first.encode(start)
        for character, part in zip(others[::2], others[1::2], strict=True):
            for byte in character.encode("utf-8"):
                tokens.append(self._processor.piece_to_id(f"<0x{byte:02X}>"))
            tokens += self._inside.encode(part)
        return tokens

    def decode(self, tokens: Iterable[int], inside: bool = False) -> str:
        processor = self._inside if inside else self._processor
        return processor.decode([int(t) for t in tokens if t >= RESERVED_IDS])

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(int(token))

    def from_own(self, own_S: np.ndarray) -> np.ndarray:
        return self.external_ids_V[natural(own_S)]

    def token_bytes(self) -> np.ndarray:
        sizes_V = np.zeros(self.vocab_size, np.int32)
        for token in range(RESERVED_IDS, self.vocab_size):
            piece = self._processor.id_to_piece(token)
            is_byte = self._processor.is_byte(token)
            sizes_V[token] = 1 if is_byte else len(piece.replace(_SPACE_MARK, " ").encode("utf-8"))
        return sizes_V


def _processor(model: bytes) -> spm.SentencePieceProcessor:
    """Loads a SentencePiece model."""
    processor = spm.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def natural(ids: np.ndarray) -> np.ndarray:
    """The ids themselves. Raises `IndexError` for negative ones, which would count from the end."""
    if len(ids) and ids.min() < 0:
        raise IndexError("a negative id")
    return ids


def check_vocabulary(vocab_size: int) -> None:
    """Raises `UserError` for a number of ids that no tokenizer trained here has."""
    if vocab_size % 128 or vocab_size < MINIMUM_VOCABULARY:
        raise UserError(
            f"--vocab_size={vocab_size} must be a multiple of 128 and at least {MINIMUM_VOCABULARY}"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a byte-pair encoding on `texts`, whose size the caller bounds.

    Args:
      texts: documents.
      vocabulary: number of ids, a multiple of 128 and at least `MINIMUM_VOCABULARY`.

    Raises:
      UserError: when the vocabulary is impossible, or too large for the texts.
    """
    check_vocabulary(vocab_size)
    special = SpecialIds()
    output = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_pieces(texts),
            model_writer=output,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            required_chars=_SPACE_MARK,  # or texts without spaces give a vocabulary without them
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 24,
            pad_id=special.pad,
            unk_id=special.unk,
            bos_id=special.bos,
            eos_id=special.eos,
            pad_piece="<pad>",
            control_symbols=["<mask>"] + [f"<reserved_{i}>" for i in range(5, RESERVED_IDS)],
            num_threads=4,  # written into the model, so a fixed number
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"SentencePiece cannot train {vocab_size} ids on this text: {reason}") from error
    return SentencePieceTokenizer(output.getvalue())


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts at line ends into pieces short enough for the trainer; line ends stay inside."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.find("\n", start + _PIECE_BYTES) + 1
            if not 0 < end <= start + 2 * _PIECE_BYTES:
                end = start + _PIECE_BYTES
            # NUL ends a sentence inside SentencePiece; it is still encoded, as a byte.
            yield text[start:end].replace("\0", " ")
            start = end
