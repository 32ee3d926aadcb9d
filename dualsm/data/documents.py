"""Documents of a corpus split, with random access to their tokens.

A document is `<s> text </s>`, little-endian uint16 (uint32 for vocabularies above 65,536). It is stored in
records of `RECORD_TOKENS` tokens, so that a segment of a long document can be read without the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from dualsm.data.damaged_corpus import DamagedCorpus
from dualsm.data.document_lengths import RECORD_TOKENS, open_lengths
from dualsm.data.record_index import RecordIndex
from dualsm.data.record_reader import RecordReader


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the dtype of stored tokens."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Documents:
    """The documents of one split, with random access.

    Attributes:
      lengths: tokens of each document, `<s>` and `</s>` included.
      tokens: tokens of the split.
      bytes: bytes of text of the split.
      bytes_N: bytes of text of each document, int64; None for the training split and for corpora of earlier
        versions.
      domains: names of the domains; empty if they are not recorded.
      domain_N: index of each document's domain, uint16; None if the domains are not recorded.
    """

    def __init__(
        self, folder: epath.Path, split: dict, dtype: np.dtype, check: Callable[[], None] = lambda: None
    ):
        """Opens the files of a split other than its shards, which are opened when they are first read.

        Args:
          folder: folder of the corpus.
          split: entry of the split in the manifest.
          dtype: dtype of the stored tokens.
          check: called before each read; raises `UserError` if the corpus is known to be damaged.

        Raises:
          DamagedCorpus: if a file is damaged, or the files do not match.
          UserError: if a file cannot be read, or a process cannot open as many files as there are shards.
        """
        self.tokens: int = split["tokens"]
        self.bytes: int = split["bytes"]
        self.bytes_N = self.domain_N = None
        self.domains: list[str] = list(split.get("domains", {}))
        self._dtype, self._check = dtype, check
        if "document_bytes" in split:
            self.bytes_N = np.frombuffer((folder / split["document_bytes"]).read_bytes(), "<i8")
        if self.domains:
            self.domain_N = np.frombuffer((folder / split["document_domains"]).read_bytes(), "<u2")
        self.lengths = open_lengths(folder, split)
        self._record_index = RecordIndex(self.lengths)
        shards = [folder / shard["file"] for shard in split["shards"]]
        self._records = RecordReader(shards, self._count_records(split["shards"]))
        if (self.lengths.records, self.lengths.tokens) != (len(self._records), self.tokens):
            raise DamagedCorpus(f"corpus {folder}: {split['lengths']} does not match the shards")
        if self.bytes_N is not None and (len(self.bytes_N), self.bytes_N.sum()) != (len(self), self.bytes):
            raise DamagedCorpus(f"corpus {folder}: {split['document_bytes']} does not match the shards")
        if self.domain_N is not None:
            counts = np.bincount(self.domain_N, minlength=len(self.domains)).tolist()
            if len(self.domain_N) != len(self) or counts != list(split["domains"].values()):
                raise DamagedCorpus(
                    f"corpus {folder}: {split['document_domains']} does not match the manifest"
                )

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def lengths_N(self) -> np.ndarray:
        """Tokens of each document, int32. Reads the lengths of the whole split, 4 bytes per document."""
        return self.lengths.read(range(len(self.lengths.token_ends_M)))

    def read(self, document_S: Sequence[int], start_S=None, stop_S=None) -> list[np.ndarray]:
        """Reads the tokens of documents, or of a segment of each document. Thread-safe.

        Args:
          document_S: indices of documents.
          start_S, stop_S: token ranges within the documents; by default, the whole documents.

        Returns:
          One array of tokens per segment.

        Raises:
          DamagedCorpus: if a shard is missing or damaged; the message names it.
          BucketError: if a bucket does not answer.
        """
        self._check()
        document_S = np.asarray(document_S, np.int64)
        start_S = np.zeros_like(document_S) if start_S is None else np.asarray(start_S)
        stop_S = self.lengths.at(document_S) if stop_S is None else np.asarray(stop_S)
        skipped_S = start_S // RECORD_TOKENS
        count_S = (stop_S - 1) // RECORD_TOKENS - skipped_S + 1
        first_S = self._record_index.first(document_S) + skipped_S
        indices = [i for first, n in zip(first_S, count_S, strict=True) for i in range(first, first + n)]
        records = iter(self._records.read(indices))
        tokens_S = []
        offset_S = skipped_S * RECORD_TOKENS
        for count, start, stop in zip(count_S, start_S - offset_S, stop_S - offset_S, strict=True):
            content = next(records) if count == 1 else b"".join(next(records) for _ in range(count))
            tokens_S.append(np.frombuffer(content, self._dtype)[start:stop])
        return tokens_S

    def _count_records(self, shards: Sequence[dict]) -> list[int]:
        """Returns the number of records of each shard."""
        if all("records" in shard for shard in shards):
            return [shard["records"] for shard in shards]
        # Manifests of earlier versions do not state it. Reads the lengths around the start of each shard.
        start_S = np.cumsum([0] + [shard["documents"] for shard in shards[:-1]])
        return np.diff(self._record_index.first(start_S), append=self.lengths.records).tolist()
