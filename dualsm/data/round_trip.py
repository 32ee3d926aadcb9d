"""Verification of shards: documents are read from disk, decoded and compared with the original texts."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from dualsm.data.document_lengths import record_count
from dualsm.data.documents import token_dtype
from dualsm.data.tokenizer import Tokenizer
from dualsm.process.errors import UserError
from dualsm.process.progress import warn

COUNTS = ("documents", "identical", "bytes", "surviving_bytes")
_SAMPLE_BYTES = 1 << 20  # text to verify per shard


def verify(path: Path, texts: list[bytes], lengths: np.ndarray, tokenizer: Tokenizer) -> collections.Counter:
    """Decodes the first documents of a shard and compares them with the original texts.

    Documents are sorted by hash, so the first ones are a random sample.

    Args:
      path: the shard.
      texts: all documents of the shard.
      lengths: tokens of each document.
      tokenizer: the tokenizer of the corpus.

    Returns:
      Counts of the sample, with the keys `COUNTS`.

    Raises:
      UserError: if the tokenizer is lossless and a decoded document differs from its text.
    """
    sample = collections.Counter(dict.fromkeys(COUNTS, 0))
    reader = array_record_module.ArrayRecordReader(str(path))
    dtype, first = token_dtype(tokenizer.vocab_size), 0
    for text, length in zip(texts, lengths, strict=True):
        last = first + int(record_count(length))
        tokens = np.frombuffer(b"".join(reader.read(first, last)), dtype)
        first, decoded = last, tokenizer.decode(tokens).encode("utf-8")
        if tokenizer.lossless and decoded != text:
            raise UserError(_difference(path.name, sample["documents"], text, decoded))
        sample["documents"] += 1
        sample["identical"] += decoded == text
        sample["bytes"] += len(text)
        sample["surviving_bytes"] += surviving_bytes(text.decode("utf-8"), decoded.decode("utf-8"))
        if sample["bytes"] >= _SAMPLE_BYTES:
            break
    reader.close()
    return sample


def _difference(shard: str, document: int, text: bytes, decoded: bytes) -> str:
    """Returns the error message for a document that does not round-trip."""
    pairs = zip(text, decoded, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(decoded)))
    before, after = text[position : position + 12], decoded[position : position + 12]
    return (
        f"{shard}: document {document} does not decode to its text, but the tokenizer should be lossless "
        f"({before} became {after} at byte {position}); try again, and report the document if it fails again"
    )


def surviving_bytes(text: str, decoded: str) -> int:
    """Returns the bytes of the characters that `text` and `decoded` share, in any order."""
    if text == decoded:
        return len(text.encode("utf-8"))
    common = collections.Counter(text) & collections.Counter(decoded)
    return sum(count * len(character.encode("utf-8")) for character, count in common.items())


def warn_of_losses(sample: dict) -> None:
    """Warns if the tokenizer changes text.

    Args:
      sample: the sums of `verify` over all shards.
    """
    if sample["identical"] < sample["documents"]:
        warn(
            f"the tokenizer changes text: in a sample, {sample['identical']:,} of {sample['documents']:,} "
            f"documents decode to the same text and {sample['surviving_bytes'] / sample['bytes']:.2%} of the "
            "bytes survive; bits per byte divide by all bytes"
        )
