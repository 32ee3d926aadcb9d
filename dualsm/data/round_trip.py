"""Verification of a shard: its documents, read from disk and decoded, are compared with their texts."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from dualsm.data import corpus
from dualsm.data.tokenizer import Tokenizer
from dualsm.process.errors import UserError
from dualsm.process.progress import warn

COUNTS = ("documents", "identical", "bytes", "surviving_bytes")
_SAMPLE_BYTES = 1 << 20  # text of each shard that is decoded


def verify(path: Path, texts: list[bytes], lengths: np.ndarray, tokenizer: Tokenizer) -> collections.Counter:
    """Decodes the first documents of a shard, read from disk, and compares them with their texts.

    Documents are in the order of their hash, so that the first ones are a fair sample.

    Returns:
      Counts of the sample: documents, those that are identical, bytes, and bytes that survive.

    Raises:
      UserError: when a lossless tokenizer does not return a text.
    """
    sample = collections.Counter(dict.fromkeys(COUNTS, 0))
    reader = array_record_module.ArrayRecordReader(str(path))
    dtype, first = corpus.token_dtype(tokenizer.vocab_size), 0
    for text, length in zip(texts, lengths, strict=True):
        last = first + int(corpus.record_count(length))
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


def _difference(shard: str, number: int, text: bytes, decoded: bytes) -> str:
    """Returns the message for a document that a lossless tokenizer changes."""
    same = next((i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), None)
    at = min(len(text), len(decoded)) if same is None else same
    before, after = (part[at : at + 12] for part in (text, decoded))
    return (
        f"{shard}: document {number} does not decode to its text, although the tokenizer is lossless; "
        f"{before} became {after} at byte {at}; try again, and if that fails too report the document"
    )


def surviving_bytes(text: str, decoded: str) -> int:
    """Returns the bytes of the characters of `text` that are in `decoded` as well, in any order."""
    if text == decoded:
        return len(text.encode("utf-8"))
    common = collections.Counter(text) & collections.Counter(decoded)
    return sum(count * len(character.encode("utf-8")) for character, count in common.items())


def warn_of_losses(sample: dict) -> None:
    """Warns when documents of the sample, counted by `COUNTS`, do not come back as they were."""
    if sample["identical"] < sample["documents"]:
        warn(
            f"the tokenizer changes text: {sample['identical']:,} of {sample['documents']:,} documents of a "
            f"sample come back as they were, and {sample['surviving_bytes'] / sample['bytes']:.2%} of their "
            "bytes survive; bits per byte divide by all bytes"
        )
