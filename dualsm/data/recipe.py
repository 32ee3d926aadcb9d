"""What decides the content of a corpus."""

from __future__ import annotations

import dataclasses

from dualsm.data.sentencepiece_tokenizer import check_vocab_size
from dualsm.process.errors import UserError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the content of a corpus; the same recipe and text give the same bytes.

    Attributes:
      input: files, globs, or "python-stdlib".
      valid_input: files that are held out; when empty a share of `input` is.
      valid_fraction: that share, by document.
      vocabulary: ids of the tokenizer to train (0 when `tokenizer` is given).
      tokenizer: file of a tokenizer to use instead.
      tokenizer_bytes: text to train the tokenizer on.
      text_key: field of the text in JSON lines, column in parquet.
      max_document_bytes: longer documents count as faults.
      max_bad_fraction: share of faulty documents that is put up with.
    """

    input: str
    valid_input: str = ""
    valid_fraction: float = 0.01
    vocab_size: int = 0
    tokenizer: str = ""
    tokenizer_bytes: int = 50_000_000
    text_key: str = "text"
    max_document_bytes: int = 64 << 20
    max_bad_fraction: float = 0.01

    def check(self) -> None:
        """Raises `UserError` for values that cannot be."""
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"--valid_fraction={self.valid_fraction} must lie in [0, 1)")
        if not self.valid_fraction and not self.valid_input:
            raise UserError("--valid_fraction=0 holds nothing out; raise it, or give --valid_input=FILES")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max_bad_fraction={self.max_bad_fraction} must lie in [0, 1]")
        if bool(self.vocab_size) == bool(self.tokenizer):
            raise UserError("give either --vocab_size=N to train a tokenizer or --tokenizer=FILE to use one")
        if self.vocab_size:
            check_vocab_size(self.vocab_size)
