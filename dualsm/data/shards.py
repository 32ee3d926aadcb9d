"""The second pass over the text: each bucket is deduplicated, encoded and written as one shard per split."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from dualsm.data import corpus, round_trip
from dualsm.data.bucket_files import read_records
from dualsm.data.document_lengths import RECORD_TOKENS, record_count
from dualsm.data.documents import token_dtype
from dualsm.data.tokenizer import Tokenizer
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.data.verification import sha256
from dualsm.data.workers import map_in_order
from dualsm.process.progress import bar

_ENCODE_BYTES = 1 << 20  # text per call of the tokenizer


@dataclasses.dataclass
class Shard:
    """A written bucket.

    Attributes:
      splits: manifest entry of the file of each split.
      lengths: tokens of each document, by split.
      bytes: bytes of text of each document, by split.
      domains: domain of each held-out document; empty names if they are not recorded.
      duplicates: number of dropped documents, without near duplicates.
      round_trip: counts of `round_trip.verify` over both splits.
    """

    splits: dict[str, dict]
    lengths: dict[str, np.ndarray]
    bytes: dict[str, np.ndarray]
    domains: list[str]
    duplicates: int
    round_trip: collections.Counter


def write_shards(pool, folder: Path, buckets: int, total_bytes: int, quiet: bool) -> list[Shard]:
    """Writes the shards of all buckets.

    Args:
      pool: executor of the workers.
      folder: temporary folder of the corpus, with the tokenizer and the buckets.
      buckets: number of buckets.
      total_bytes: text in the buckets, for the progress bar.
      quiet: show no progress bar.
    """
    shards = []
    write = functools.partial(_write_shard, folder, buckets)
    with bar(total=total_bytes, desc="encoding", unit="B", unit_scale=True, disable=quiet) as progress:
        for shard in map_in_order(pool, write, range(buckets), buckets):
            progress.update(sum(split["bytes"] for split in shard.splits.values()))
            shards.append(shard)
        progress.update(progress.total - progress.n)  # dropped duplicates
    return shards


def _write_shard(folder: Path, buckets: int, bucket: int) -> Shard:
    """Sorts, deduplicates, encodes and writes one bucket. Runs in a worker process."""
    tokenizer = load_tokenizer(str(folder / corpus.TOKENIZER))
    records, duplicates = read_records(folder / "buckets", bucket)
    domains = [record.domain for record in records if record.held_out]
    shard = Shard({}, {}, {}, domains, duplicates, collections.Counter())
    for split in corpus.SPLITS:
        texts = [record.text for record in records if record.held_out == (split == "valid")]
        if not texts:
            continue
        path = folder / f"{split}-{bucket:05d}-of-{buckets:05d}.array_record"
        lengths = _write_records(path, texts, tokenizer)
        shard.round_trip += round_trip.verify(path, texts, lengths, tokenizer)
        shard.lengths[split] = lengths
        shard.bytes[split] = np.array([len(text) for text in texts], "<i8")
        shard.splits[split] = {
            "file": path.name,
            "documents": len(texts),
            "tokens": int(lengths.sum()),
            "records": int(record_count(lengths).sum()),
            "bytes": sum(map(len, texts)),
            "words": sum(len(text.decode("utf-8").split()) for text in texts),
            "size": path.stat().st_size,
            "sha256": sha256(path),
        }
        if split == "valid":
            shard.splits[split]["gzip_bytes"] = sum(len(gzip.compress(text, 9)) for text in texts)
    return shard


def _write_records(path: Path, texts: list[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """Writes the records of documents; returns the lengths of the documents in tokens, int32."""
    bos, eos = tokenizer.special.bos, tokenizer.special.eos
    dtype = token_dtype(tokenizer.vocab_size)
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:1")
    lengths = []
    for batch in _batches(texts, _ENCODE_BYTES):
        for tokens in tokenizer.encode([text.decode("utf-8") for text in batch]):
            document = np.array([bos, *tokens, eos], dtype)
            for start in range(0, len(document), RECORD_TOKENS):
                writer.write(document[start : start + RECORD_TOKENS].tobytes())
            lengths.append(len(document))
    writer.close()
    return np.array(lengths, "<i4")


def _batches(texts: list[bytes], size: int) -> Iterator[list[bytes]]:
    """Yields consecutive texts of at least `size` bytes in total; the last batch may be smaller or empty."""
    batch, batch_bytes = [], 0
    for text in texts:
        batch.append(text)
        batch_bytes += len(text)
        if batch_bytes >= size:
            yield batch
            batch, batch_bytes = [], 0
    yield batch
