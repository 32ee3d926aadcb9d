"""SentencePiece tokenizers with dualsm's special ids, and their training.

Tokenizers trained here are lossless (`decode(encode(text)) == text`): no normalization, no dummy prefix, byte
fallback. Bits per byte are therefore comparable between vocabularies.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece as spm

from dualsm.data.tokenizer import RESERVED_IDS, SPECIAL_PIECES, SpecialIds, Tokenizer, check_not_negative
from dualsm.process.errors import UserError

BYTE_PIECES = 256
MIN_VOCAB_SIZE = 384  # the smallest multiple of 128 above RESERVED_IDS + BYTE_PIECES
_SPACE_MARK = "\u2581"
# Protocol buffers merge appended messages: these bytes override `normalizer_spec` fields of a model.
_PLAIN_EDGES = bytes.fromhex("1a04 1800 2000")  # add_dummy_prefix=false, remove_extra_whitespaces=false
_NO_NORMALIZER = bytes.fromhex("1a06 1200 1800 2000")  # also an empty precompiled_charsmap
_SENTENCE_CHARACTERS = 2000  # approximate length of the training sentences that a text is split into


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with dualsm's special ids."""

    def __init__(self, model: bytes):
        """Loads a model.

        Args:
          model: content of the model file.

        Raises:
          UserError: if `model` is not a SentencePiece model or lacks a special piece.
        """
        self.model = model
        try:
            self._processor = _processor(model)
            self.vocab_size = self._processor.vocab_size()
            pieces = self._processor.id_to_piece(list(range(self.vocab_size)))  # raises if one is not UTF-8
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
        # SentencePiece encodes a space as U+2581. The character U+2581 itself is encoded as bytes, and so are
        # spaces if the vocabulary lacks U+2581.
        self._as_bytes = re.compile(f"({_SPACE_MARK})" if _SPACE_MARK in pieces else f"([ {_SPACE_MARK}])")

    def _is_lossless(self) -> bool:
        """Returns True if the model has all bytes and does not normalize text."""
        unchanged = _processor(self.model + _NO_NORMALIZER).serialized_model_proto()
        has_bytes = sum(self._processor.is_byte(list(range(self.vocab_size)))) == BYTE_PIECES
        return has_bytes and self._processor.serialized_model_proto() == unchanged

    def encode(self, texts: Sequence[str], inside: bool = False) -> list[list[int]]:
        first = self._inside if inside else self._processor
        return [self._encode(text, first) for text in texts]

    def _encode(self, text: str, first: spm.SentencePieceProcessor) -> list[int]:
        start, *others = self._as_bytes.split(text)
        tokens = first.encode(start)
        for character, following in zip(others[::2], others[1::2], strict=True):
            for byte in character.encode("utf-8"):
                tokens.append(self._processor.piece_to_id(f"<0x{byte:02X}>"))
            tokens += self._inside.encode(following)
        return tokens

    def decode(self, tokens: Iterable[int], inside: bool = False) -> str:
        processor = self._inside if inside else self._processor
        return processor.decode([int(t) for t in tokens if t >= RESERVED_IDS])

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(int(token))

    def from_external_ids(self, external_S: np.ndarray) -> np.ndarray:
        return self.external_ids_V[check_not_negative(external_S)]

    def token_bytes(self) -> np.ndarray:
        sizes_V = np.zeros(self.vocab_size, np.int32)
        for token in range(RESERVED_IDS, self.vocab_size):
            piece = self._processor.id_to_piece(token)
            is_byte = self._processor.is_byte(token)
            sizes_V[token] = 1 if is_byte else len(piece.replace(_SPACE_MARK, " ").encode("utf-8"))
        return sizes_V


def _processor(model: bytes) -> spm.SentencePieceProcessor:
    processor = spm.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def check_vocab_size(vocab_size: int) -> None:
    """Raises `UserError` if `train_tokenizer` does not support the vocabulary size."""
    if vocab_size % 128 or vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"--vocab_size={vocab_size} must be a multiple of 128 and at least {MIN_VOCAB_SIZE}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a byte-pair encoding on all of `texts`.

    Args:
      texts: documents.
      vocab_size: number of ids, a multiple of 128 and at least `MIN_VOCAB_SIZE`.

    Raises:
      UserError: if the vocabulary size is not supported, or too large for the texts.
    """
    check_vocab_size(vocab_size)
    special = SpecialIds()
    output = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=output,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            required_chars=_SPACE_MARK,  # otherwise missing from vocabularies of texts without spaces
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
            num_threads=4,  # stored in the model, so a constant
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"SentencePiece cannot train {vocab_size} ids on this text: {reason}") from error
    return SentencePieceTokenizer(output.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Splits texts at line ends into sentences short enough for the trainer; line ends are kept."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.find("\n", start + _SENTENCE_CHARACTERS) + 1
            if not 0 < end <= start + 2 * _SENTENCE_CHARACTERS:
                end = start + _SENTENCE_CHARACTERS
            # The trainer ends a sentence at NUL. Encoding does not: it represents NUL as a byte.
            yield text[start:end].replace("\0", " ")
            start = end
