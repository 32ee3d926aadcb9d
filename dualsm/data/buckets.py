"""The first pass over the text: documents are parsed, hashed, and sorted into buckets by their hash."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from dualsm.data import readers
from dualsm.data.recipe import Recipe
from dualsm.data.workers import in_order
from dualsm.process.errors import UserError
from dualsm.process.progress import bar

_FAULTS_JUDGED_AFTER = 1000  # documents; before that a share of bad ones means little
_HEADER = struct.Struct("<16s?I")  # hash, held out, bytes of text


@dataclasses.dataclass
class Counts:
    """What the first pass saw.

    Attributes:
      read: documents, faulty ones included.
      held_out: usable documents of the split "valid", duplicates included.
      bytes: of usable text.
      faults: how many documents had each of `readers.FAULTS`.
      last_faults: the place of the last one of each kind, and more about it.
    """

    read: int = 0
    held_out: int = 0
    bytes: int = 0
    faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    last_faults: dict[str, str] = dataclasses.field(default_factory=dict)

    def judge(self, allowed: float, at_least: int) -> None:
        """Raises `UserError` when more than the allowed share of documents is faulty."""
        bad = self.faults.total()
        if bad > allowed * max(self.read, at_least):
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.faults.most_common())
            last = self.last_faults[self.faults.most_common(1)[0][0]]
            raise UserError(
                f"{bad} of {self.read} documents are unusable ({kinds}), the last at {last}; "
                f"mend the input or raise --max_bad_fraction (now {allowed})"
            )

    def check_splits(self, recipe: Recipe) -> None:
        """Raises `UserError` when a split has no document."""
        usable = self.read - self.faults.total()
        if not usable or (recipe.valid_input and usable == self.held_out):
            raise UserError(f"--input={recipe.input} holds no documents")
        if recipe.valid_input and not self.held_out:
            raise UserError(f"--valid_input={recipe.valid_input} holds no documents")
        if usable == 1:
            raise UserError(
                f"--input={recipe.input} is a single document, which cannot be both trained on and held out; "
                "split it into several, or give --valid_input=FILES"
            )
        if self.held_out in (0, usable):
            split, hint = ("train", "lower") if self.held_out else ("valid", "raise")
            raise UserError(
                f"no document is left for the {split} split; {hint} --valid_fraction or give more text"
            )


@dataclasses.dataclass(frozen=True)
class Scatter:
    """The first pass, with what its workers need to know.

    Attributes:
      recipe: of the corpus.
      folder: of the buckets' files.
      buckets: how many there are.
    """

    recipe: Recipe
    folder: Path
    buckets: int

    def run(self, pool, workers: int, train_files, valid_files, quiet: bool) -> Counts:
        """Reads all files into the buckets.

        Raises:
          UserError: when too many documents are faulty, or a split has none.
        """
        counts = Counts()
        total = sum(readers.input_bytes(train_files + valid_files))
        blocks = itertools.chain(
            ((b, False) for path in train_files for b in self._blocks(path, len(train_files) == 1)),
            ((b, True) for path in valid_files for b in self._blocks(path, len(valid_files) == 1)),
        )
        with bar(total=total, desc="reading", unit="B", unit_scale=True, disable=quiet) as progress:
            for read, held, size, faults, consumed in in_order(pool, self.one_block, blocks, 4 * workers):
                progress.update(consumed)
                counts.read += read
                counts.held_out += held
                counts.bytes += size
                for kind, where in faults:
                    counts.faults[kind] += 1
                    counts.last_faults[kind] = where
                counts.judge(self.recipe.max_bad_fraction, _FAULTS_JUDGED_AFTER)
        counts.judge(self.recipe.max_bad_fraction, 0)
        counts.check_splits(self.recipe)
        if self.recipe.valid_input and not self._trained_on():
            raise UserError(
                f"no document is left to train on: --valid_input has all of --input={self.recipe.input} too"
            )
        return counts

    def _trained_on(self) -> bool:
        """Whether documents are left to train on, without those that are held out as well."""
        buckets = (read_bucket(self.folder, bucket)[0] for bucket in range(self.buckets))
        return any(not valid for documents in buckets for valid, _ in documents)

    def _blocks(self, path: str, divide: bool) -> Iterator[readers.Block]:
        return readers.read_blocks(path, self.recipe.text_key, self.recipe.max_document_bytes, divide)

    def _parse(self, item: bytes | None, form: str) -> str:
        return readers.parse(item, form, self.recipe.text_key, self.recipe.tokenizer)

    def one_block(self, job: tuple[readers.Block, bool]) -> tuple[int, int, int, list[tuple[str, str]], int]:
        """Worker: appends the documents of a block to this process's bucket files.

        Returns:
          Documents read, those of them held out, bytes of text, faults as (kind, place), bytes of the file.
        """
        block, held_out = job
        parts: dict[int, list[bytes]] = collections.defaultdict(list)
        faults, held, size = [], 0, 0
        for offset, item in enumerate(block.items):
            try:
                text = self._parse(item, block.form).encode("utf-8")
            except readers.Fault as fault:
                faults.append((fault.kind, f"{block.place(offset)} ({fault})"))
                continue
            size += len(text)
            digest = hashlib.blake2b(text, digest_size=16).digest()
            valid = held_out
            if not self.recipe.valid_input:
                valid = int.from_bytes(digest[8:], "big") < self.recipe.valid_fraction * 2.0**64
            held += valid
            bucket = int.from_bytes(digest[:8], "big") * self.buckets >> 64
            parts[bucket] += (_HEADER.pack(digest, valid, len(text)), text)
        for bucket, pieces in parts.items():
            with open(self.folder / f"{bucket:06d}-{os.getpid()}", "ab") as file:
                file.write(b"".join(pieces))
        return len(block.items), held, size, faults, block.consumed


def read_bucket(folder: Path, bucket: int) -> tuple[list[tuple[bool, bytes]], int]:
    """Documents of a bucket in hash order as (held out, text), without duplicates, and how many those were.

    Of equal documents a held-out one stays, so that nothing of it is trained on.
    """
    documents = []
    for path in folder.glob(f"{bucket:06d}-*"):
        data, position = path.read_bytes(), 0
        while position < len(data):
            digest, valid, size = _HEADER.unpack_from(data, position)
            position += _HEADER.size + size
            documents.append((digest, not valid, data[position - size : position]))
    documents.sort(key=lambda document: document[:2])
    unique = [next(group) for _, group in itertools.groupby(documents, key=lambda document: document[0])]
    return [(not train, text) for _, train, text in unique], len(documents) - len(unique)
