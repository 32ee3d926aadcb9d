"""Tokenizer files: SentencePiece models and Hugging Face `tokenizer.json` files."""

from __future__ import annotations

from etils import epath

from dualsm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from dualsm.data.tokenizer import Tokenizer
from dualsm.data.tokenizer_json import JsonTokenizer
from dualsm.process.errors import UserError
from dualsm.process.paths import user_path


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """Loads a SentencePiece model or a `tokenizer.json`; the content determines the format.

    Raises:
      UserError: if the file cannot be read or lacks special tokens. The message names the file.
    """
    try:
        model = user_path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror or error}; check the path") from error
    tokenizer_class = JsonTokenizer if model.lstrip()[:1] == b"{" else SentencePieceTokenizer
    try:
        return tokenizer_class(model)
    except UserError as error:
        raise UserError(f"tokenizer {path}: {error}") from error
