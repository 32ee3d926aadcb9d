"""The options that determine the content of a corpus."""

from __future__ import annotations

import dataclasses

from dualsm.data.inputs import FORMATS
from dualsm.data.sentencepiece_tokenizer import check_vocab_size
from dualsm.data.streams import SPLITS
from dualsm.process.errors import UserError

DEDUPLICATE = ("exact", "near")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Options of a corpus; the same recipe and text always produce the same bytes.

    Attributes:
      input: files, globs, or "python-stdlib".
      valid_input: held-out files; if empty, a fraction of `input` is held out.
      valid_fraction: fraction of documents to hold out.
      vocab_size: size of the tokenizer to train; 0 if `tokenizer` is given.
      tokenizer: tokenizer file to use instead of training one.
      tokenizer_bytes: bytes of text to train the tokenizer on.
      text_key: fields of the text in JSON, columns in CSV, Parquet and Arrow, separated by commas.
      max_document_bytes: longer documents are dropped; bytes of the text, or in JSON of the line or object
        with all of its fields, or token ids in Megatron-LM files.
      max_bad_fraction: maximum fraction of documents that may be unusable.
      format: format of the files; "auto": their suffixes determine it.
      decontaminate: folders or files of tasks; documents that share n-grams with their texts are dropped.
      decontaminate_words: n, the words of an n-gram.
      deduplicate: "exact", or "near" to drop near duplicates also.
      near_similarity: minimum Jaccard similarity of near duplicates.
      near_words: words of the n-grams that near duplicates share.
      split: documents of a text file, one of `streams.SPLITS` or "auto".
      domain_key: field or column with the domain of each held-out document, or `FILE_DOMAIN`; "": not
        recorded.
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
    format: str = "auto"
    split: str = "auto"
    deduplicate: str = "exact"
    near_similarity: float = 0.8
    near_words: int = 5
    decontaminate: str = ""
    decontaminate_words: int = 13
    domain_key: str = ""

    def check(self) -> None:
        """Raises `UserError` for values out of range."""
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"--valid_fraction={self.valid_fraction} must be in [0, 1)")
        if not self.valid_fraction and not self.valid_input:
            raise UserError("--valid_fraction=0 holds out no documents; raise it or pass --valid_input=FILES")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max_bad_fraction={self.max_bad_fraction} must be in [0, 1]")
        if not all(self.text_key.split(",")):
            raise UserError(f"--text_key={self.text_key!r} has an empty name; remove the extra comma")
        for flag, choices in (
            ("format", FORMATS),
            ("split", ("auto", *SPLITS)),
            ("deduplicate", DEDUPLICATE),
        ):
            if getattr(self, flag) not in choices:
                raise UserError(f"--{flag}={getattr(self, flag)} must be one of {', '.join(choices)}")
        if not 0 < self.near_similarity <= 1:
            raise UserError(f"--near_similarity={self.near_similarity} must be in (0, 1]")
        if self.near_words < 1:
            raise UserError(f"--near_words={self.near_words} must be at least 1")
        near, contaminated = self.deduplicate == "near", bool(self.decontaminate)
        for flag, is_used, reason in (
            ("near_similarity", near, "; pass --deduplicate=near also"),
            ("near_words", near, "; pass --deduplicate=near also"),
            ("decontaminate_words", contaminated, "; pass --decontaminate=FOLDER also"),
            (
                "tokenizer_bytes",
                not self.tokenizer,
                " with --tokenizer; pass --vocab_size=N instead of --tokenizer",
            ),
        ):
            if not is_used and getattr(self, flag) != getattr(Recipe, flag):
                raise UserError(f"--{flag}={getattr(self, flag)} has no effect{reason}, or remove it")
        if self.decontaminate_words < 1:
            raise UserError(f"--decontaminate_words={self.decontaminate_words} must be at least 1")
        if bool(self.vocab_size) == bool(self.tokenizer):
            raise UserError("pass either --vocab_size=N to train a tokenizer or --tokenizer=FILE to use one")
        if self.vocab_size:
            check_vocab_size(self.vocab_size)
