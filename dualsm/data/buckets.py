"""The first pass over the text: documents are parsed, hashed and written to buckets by hash."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dualsm.data import inputs, readers
from dualsm.data.bucket_files import append_records, pack_record, read_bucket
from dualsm.data.decontamination import TaskNgrams, load_ngrams
from dualsm.data.domains import MAX_DOMAINS, check_domains
from dualsm.data.faults import Fault
from dualsm.data.fields import names_of
from dualsm.data.recipe import Recipe
from dualsm.data.workers import map_in_order
from dualsm.process.errors import UserError
from dualsm.process.progress import bar

_MIN_CHECKED = 1000  # documents; the fraction of unusable ones among fewer is too noisy
NGRAMS = "task-ngrams.npz"  # in the folder of the buckets


class BlockCounts(NamedTuple):
    """Statistics of a block.

    Attributes:
      read: number of documents, dropped ones included.
      held_out: number of kept documents in the split "valid", duplicates included.
      bytes: bytes of kept text.
      faults: kind and description of each unusable document.
      contaminated: for each document that overlaps task texts, the indices of the task files.
      domains: domains of the held-out documents; empty if they are not recorded.
      is_json: True if the documents are JSON.
      fields: names in --text_key that exist in a JSON document.
      consumed: bytes of the file that the block represents.
    """

    read: int
    held_out: int
    bytes: int
    faults: list[tuple[str, str]]
    contaminated: list[list[int]]
    domains: set[str]
    is_json: bool
    fields: set[str]
    consumed: int


@dataclasses.dataclass
class Counts:
    """Statistics of the first pass.

    Attributes:
      read: number of documents, dropped ones included.
      held_out: number of kept documents in the split "valid", duplicates included.
      bytes: bytes of kept text.
      contaminated: number of documents that overlap task texts, duplicates included.
      contaminated_by: number of these documents per index of the task file.
      domains: domains of the held-out documents; empty if they are not recorded.
      json: number of JSON documents, dropped ones included.
      fields: names in --text_key that exist in a JSON document.
      faults: number of unusable documents per kind in `faults.FAULTS`.
      last_faults: description and location of the last unusable document of each kind.
    """

    read: int = 0
    held_out: int = 0
    bytes: int = 0
    contaminated: int = 0
    contaminated_by: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    domains: set[str] = dataclasses.field(default_factory=set)
    json: int = 0
    fields: set[str] = dataclasses.field(default_factory=set)
    faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    last_faults: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, block: BlockCounts) -> None:
        """Adds the statistics of a block."""
        self.read += block.read
        self.held_out += block.held_out
        self.bytes += block.bytes
        self.contaminated += len(block.contaminated)
        self.domains |= block.domains
        self.json += block.read if block.is_json else 0
        self.fields |= block.fields
        for files in block.contaminated:
            self.contaminated_by.update(files)
        for kind, description in block.faults:
            self.faults[kind] += 1
            self.last_faults[kind] = description

    def check_faults(self, max_fraction: float, min_documents: int = 0) -> None:
        """Raises `UserError` if more than `max_fraction` of the documents are unusable."""
        bad = self.faults.total()
        if bad > max_fraction * max(self.read, min_documents):
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.faults.most_common())
            last = self.last_faults[self.faults.most_common(1)[0][0]]
            raise UserError(
                f"{bad} of {self.read} documents are unusable ({kinds}), most recently {last}; "
                f"fix the input or raise --max_bad_fraction={max_fraction}"
            )

    def check_fields(self, text_key: str) -> None:
        """Raises `UserError` if there is JSON, and none of its documents has one of the fields."""
        missing = [name for name in names_of(text_key, self.fields) if name not in self.fields]
        if self.json and missing:
            raise UserError(
                f"--text_key={text_key}: no JSON document has the field {missing[0]!r}; correct it"
            )

    def check_splits(self, recipe: Recipe) -> None:
        """Raises `UserError` if a split has no documents."""
        usable = self.read - self.faults.total() - self.contaminated
        if self.contaminated and (not usable or (recipe.valid_input and usable == self.held_out)):
            raise UserError(
                f"all documents to train on overlap texts of --decontaminate={recipe.decontaminate}; give "
                f"more text or raise --decontaminate_words={recipe.decontaminate_words}"
            )
        if not usable or (recipe.valid_input and usable == self.held_out):
            raise UserError(f"--input={recipe.input} contains no documents; check the files and --text_key")
        if recipe.valid_input and not self.held_out:
            raise UserError(
                f"--valid_input={recipe.valid_input} contains no documents; check the files and --text_key"
            )
        if usable == 1:
            dropped = f" ({self.contaminated} overlap texts of --decontaminate)" if self.contaminated else ""
            raise UserError(
                f"--input={recipe.input} has a single usable document{dropped}, so none can be held out; "
                "split it into several documents, give more text or pass --valid_input=FILES"
            )
        if self.held_out in (0, usable):
            split, action = ("train", "lower") if self.held_out else ("valid", "raise")
            raise UserError(
                f"no documents for the {split} split at --valid_fraction={recipe.valid_fraction}; "
                f"{action} it or give more text"
            )


@dataclasses.dataclass(frozen=True)
class Scatter:
    """The first pass, and the state that its worker processes need.

    Attributes:
      recipe: the recipe of the corpus.
      folder: the folder of the bucket files.
      buckets: the number of buckets.
      ngrams_sha256: hash of the n-grams of task texts, if they are removed.
    """

    recipe: Recipe
    folder: Path
    buckets: int
    ngrams_sha256: str = ""

    def run(self, pool, workers: int, train_files, valid_files, quiet: bool) -> Counts:
        """Reads all files into the buckets.

        Raises:
          UserError: if too many documents are unusable, or a split has no documents.
        """
        counts = Counts()
        total = inputs.input_bytes(train_files + valid_files)
        blocks = itertools.chain(
            ((b, False) for path in train_files for b in self._blocks(path, len(train_files) == 1)),
            ((b, True) for path in valid_files for b in self._blocks(path, len(valid_files) == 1)),
        )
        with bar(total=total, desc="reading", unit="B", unit_scale=True, disable=quiet) as progress:
            results = map_in_order(pool, self.write_block, blocks, lookahead=4 * workers)
            for block_counts in results:
                progress.update(block_counts.consumed)
                counts.add(block_counts)
                counts.check_faults(self.recipe.max_bad_fraction, _MIN_CHECKED)
                if len(counts.domains) > MAX_DOMAINS:
                    check_domains(self.recipe.domain_key, counts.domains)
        counts.check_faults(self.recipe.max_bad_fraction)
        counts.check_splits(self.recipe)
        counts.check_fields(self.recipe.text_key)
        if self.recipe.domain_key:
            check_domains(self.recipe.domain_key, counts.domains)
        if self.recipe.valid_input and not self._has_training_documents():
            raise UserError(
                f"no documents to train on: --valid_input contains all documents of "
                f"--input={self.recipe.input}; remove some of them from --valid_input"
            )
        return counts

    def _has_training_documents(self) -> bool:
        """Returns True if at least one document is not held out, after deduplication."""
        buckets = (read_bucket(self.folder, bucket)[0] for bucket in range(self.buckets))
        return any(not held_out for documents in buckets for held_out, _ in documents)

    def _blocks(self, path: str, divide: bool) -> Iterator[readers.Block]:
        recipe = self.recipe
        return readers.read_blocks(
            path,
            recipe.text_key,
            recipe.max_document_bytes,
            divide,
            recipe.format,
            recipe.split,
            recipe.domain_key,
        )

    def _parse(self, item: readers.Item, form: str, fields: set[str]) -> str:
        return readers.parse(item, form, self.recipe.text_key, self.recipe.tokenizer, fields)

    def _ngrams(self) -> TaskNgrams | None:
        return load_ngrams(self.folder / NGRAMS, self.ngrams_sha256) if self.ngrams_sha256 else None

    def write_block(self, job: tuple[readers.Block, bool]) -> BlockCounts:
        """Appends the documents of a block to the bucket files of this worker process.

        Args:
          job: the block, and True if its documents are from `valid_input`. Those are not trained on, so they
            may overlap task texts.
        """
        block, from_valid_input = job
        records: dict[int, list[bytes]] = collections.defaultdict(list)
        ngrams = None if from_valid_input else self._ngrams()
        faults, contaminated, num_read, num_held_out, size = [], [], 0, 0, 0
        domains: set[str] = set()
        fields: set[str] = set()
        for offset, item in enumerate(block.items):
            if readers.is_blank(item, block.form):
                continue
            try:
                parsed = self._parse(item, block.form, fields)
            except Fault as fault:
                faults += [(fault.kind, f"{block.location(offset)} ({fault})")] * fault.documents
                num_read += fault.documents
                continue
            num_read += 1
            if ngrams and (matches := ngrams.matches(parsed)):
                contaminated.append(matches)
                continue
            text = parsed.encode("utf-8")
            size += len(text)
            digest = hashlib.blake2b(text, digest_size=16).digest()
            held_out = from_valid_input
            if not self.recipe.valid_input:
                held_out = int.from_bytes(digest[8:], "big") < self.recipe.valid_fraction * 2.0**64
            num_held_out += held_out
            domain = ""
            if held_out and self.recipe.domain_key:
                domain = readers.parse_domain(block, offset, self.recipe.domain_key)
                domains.add(domain)
            bucket = int.from_bytes(digest[:8], "big") * self.buckets >> 64
            records[bucket] += pack_record(digest, held_out, text, domain)
        for bucket, content in records.items():
            append_records(self.folder, bucket, content)
        return BlockCounts(
            read=num_read,
            held_out=num_held_out,
            bytes=size,
            faults=faults,
            contaminated=contaminated,
            domains=domains,
            is_json=block.form in ("json", "jsonl"),
            fields=fields,
            consumed=block.consumed,
        )
