"""From text to a prepared corpus, in bounded memory and with several worker processes.

One idea does the shuffle, the split and the removal of duplicates: documents are ordered by a hash of
their text. That order is random but fixed, equal documents become neighbours, and another part of the
same hash decides which documents are held out.

    inputs -> blocks of lines -> [workers: parse, hash] -> buckets by hash, on disk
           -> tokenizer from the first buckets
           -> [workers: sort a bucket, drop duplicates, encode] -> one shard a bucket

Everything is written to a folder beside the output, which is renamed when it is whole.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from dualsm import __version__
from dualsm.data import corpus, readers
from dualsm.data.tokenizer import Tokenizer, train_tokenizer
from dualsm.data.workers import in_order, pool_of
from dualsm.errors import UserError
from dualsm.progress import bar

_BUCKET_BYTES = 32 << 20  # text a worker holds at once
_MINIMUM_BUCKETS = 8
_ENCODE_BYTES = 1 << 20  # text handed to SentencePiece at once
_FAULTS_JUDGED_AFTER = 1000  # documents; before that a share of bad ones means little
_HEADER = struct.Struct("<16s?I")  # hash, held out, bytes of text


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
    vocabulary: int = 0
    tokenizer: str = ""
    tokenizer_bytes: int = 50_000_000
    text_key: str = "text"
    max_document_bytes: int = 64 << 20
    max_bad_fraction: float = 0.01

    def check(self) -> None:
        """Raises `UserError` for values that cannot be."""
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"--valid_fraction={self.valid_fraction} must lie in [0, 1)")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max_bad_fraction={self.max_bad_fraction} must lie in [0, 1]")
        if bool(self.vocabulary) == bool(self.tokenizer):
            raise UserError("give either --vocab_size=N to train a tokenizer or --tokenizer=FILE to use one")


def build(recipe: Recipe, output: str, workers: int, quiet: bool = False) -> dict:
    """Writes the corpus folder `output` and returns its manifest.

    Args:
      recipe: what to build.
      output: folder to make; it must not exist, or hold a corpus of the same recipe.
      workers: processes; 1 is this one alone.
      quiet: no progress bars.

    Raises:
      UserError: for bad input, or when `output` holds something else.
    """
    recipe.check()
    target = Path(output)
    if target.exists():
        return _existing(recipe, target)
    train_files = readers.find_inputs(recipe.input)
    valid_files = readers.find_inputs(recipe.valid_input) if recipe.valid_input else []
    tokenizer = Tokenizer.load(recipe.tokenizer) if recipe.tokenizer else None
    aside = _fresh_aside(target)
    try:
        with pool_of(workers) as pool:
            buckets = max(_MINIMUM_BUCKETS, -(-readers.unpacked_bytes(train_files) // _BUCKET_BYTES))
            scatter = _Scatter(recipe, aside / "buckets", buckets)
            counts = scatter.run(pool, workers, train_files, valid_files, quiet)
            if tokenizer is None:
                tokenizer = _train(recipe, aside / "buckets", buckets, quiet)
            (aside / corpus.TOKENIZER).write_bytes(tokenizer.model)
            shards = _encode(pool, aside, buckets, tokenizer, counts, quiet)
        shutil.rmtree(aside / "buckets")
        manifest = _manifest(recipe, aside, tokenizer, counts, shards, len(train_files + valid_files))
        (aside / corpus.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        aside.rename(target)
        return manifest
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _existing(recipe: Recipe, target: Path) -> dict:
    """The manifest in `target` when it was made by the same recipe; otherwise refuses."""
    try:
        manifest = json.loads((target / corpus.MANIFEST).read_text())
        if manifest["arguments"] == dataclasses.asdict(recipe):
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"--output={target} exists and was not made by this command; remove it or choose another")


def _fresh_aside(target: Path) -> Path:
    """A folder beside `target` to write in; those that dead processes left are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-"
    for left in target.parent.glob(f"{prefix}*"):
        pid = left.name.removeprefix(prefix)
        if not pid.isdigit() or not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    aside = target.parent / f"{prefix}{os.getpid()}"
    (aside / "buckets").mkdir(parents=True)
    return aside


# --- first pass: parse, hash, scatter ------------------------------------------------------------------


@dataclasses.dataclass
class _Counts:
    """What the first pass saw."""

    read: int = 0
    bytes: int = 0
    faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    last_fault: str = ""

    def judge(self, allowed: float, at_least: int) -> None:
        """Raises `UserError` when more than the allowed share of documents is faulty."""
        bad = self.faults.total()
        if bad > allowed * max(self.read, at_least):
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.faults.most_common())
            raise UserError(
                f"{bad} of {self.read} documents are unusable ({kinds}), the last at {self.last_fault}; "
                f"mend the input or raise --max_bad_fraction (now {allowed})"
            )


@dataclasses.dataclass(frozen=True)
class _Scatter:
    """The first pass, with what its workers need to know."""

    recipe: Recipe
    folder: Path
    buckets: int

    def run(self, pool, workers: int, train_files, valid_files, quiet: bool) -> _Counts:
        counts = _Counts()
        total = sum(readers.input_bytes(train_files + valid_files))
        blocks = itertools.chain(
            ((b, False) for path in train_files for b in self._blocks(path)),
            ((b, True) for path in valid_files for b in self._blocks(path)),
        )
        with bar(total=total, desc="reading", unit="B", unit_scale=True, disable=quiet) as progress:
            for read, size, faults, consumed in in_order(pool, self.one_block, blocks, 4 * workers):
                progress.update(consumed)
                counts.read += read
                counts.bytes += size
                for kind, where in faults:
                    counts.faults[kind] += 1
                    counts.last_fault = f"{where} ({kind})"
                counts.judge(self.recipe.max_bad_fraction, _FAULTS_JUDGED_AFTER)
        counts.judge(self.recipe.max_bad_fraction, 0)
        if counts.read == counts.faults.total():
            raise UserError(f"--input={self.recipe.input} holds no documents")
        return counts

    def _blocks(self, path: str) -> Iterator[readers.Block]:
        return readers.read_blocks(path, self.recipe.text_key, self.recipe.max_document_bytes)

    def _parse(self, item: bytes | None, form: str) -> str:
        return readers.parse(item, form, self.recipe.text_key, self.recipe.tokenizer)

    def one_block(self, job: tuple[readers.Block, bool]) -> tuple[int, int, list[tuple[str, str]], int]:
        """Worker: appends the documents of a block to this process's bucket files."""
        block, held_out = job
        parts: dict[int, list[bytes]] = collections.defaultdict(list)
        faults, size = [], 0
        for offset, item in enumerate(block.items):
            try:
                text = self._parse(item, block.form).encode("utf-8")
            except readers.Fault as fault:
                faults.append((fault.kind, f"{block.path}, line {block.first + offset}"))
                continue
            size += len(text)
            digest = hashlib.blake2b(text, digest_size=16).digest()
            valid = held_out
            if not self.recipe.valid_input:
                valid = int.from_bytes(digest[8:], "big") < self.recipe.valid_fraction * 2.0**64
            bucket = int.from_bytes(digest[:8], "big") * self.buckets >> 64
            parts[bucket] += (_HEADER.pack(digest, valid, len(text)), text)
        for bucket, pieces in parts.items():
            with open(self.folder / f"{bucket:06d}-{os.getpid()}", "ab") as file:
                file.write(b"".join(pieces))
        return len(block.items), size, faults, block.consumed


def _read_bucket(folder: Path, bucket: int) -> tuple[list[tuple[bool, bytes]], int]:
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


# --- tokenizer and second pass: sort, encode, write ----------------------------------------------------


def _train(recipe: Recipe, folder: Path, buckets: int, quiet: bool) -> Tokenizer:
    """Trains the tokenizer on the first documents in hash order, which are a fair sample."""

    def sample() -> Iterator[str]:
        left = recipe.tokenizer_bytes
        for bucket in range(buckets):
            for valid, text in _read_bucket(folder, bucket)[0]:
                if not valid and left > 0:
                    progress.update(len(text))
                    left -= len(text)
                    yield text.decode("utf-8")
            if left <= 0:
                return

    description = f"training a tokenizer of {recipe.vocabulary} ids"
    with bar(desc=description, unit="B", unit_scale=True, disable=quiet) as progress:
        return train_tokenizer(sample(), recipe.vocabulary)


@dataclasses.dataclass
class _Shard:
    """One bucket as written: per split a file, its numbers, and the lengths of its documents."""

    splits: dict[str, dict]
    lengths: dict[str, np.ndarray]
    duplicates: int


def _encode(pool, aside: Path, buckets: int, tokenizer: Tokenizer, counts, quiet: bool) -> list[_Shard]:
    shards = []
    encoder = _Encoder(aside, buckets)
    with bar(total=counts.bytes, desc="encoding", unit="B", unit_scale=True, disable=quiet) as progress:
        for shard in in_order(pool, encoder.one_bucket, range(buckets), buckets):
            progress.update(sum(split["bytes"] for split in shard.splits.values()))
            shards.append(shard)
        progress.update(progress.total - progress.n)  # the duplicates
    return shards


@dataclasses.dataclass(frozen=True)
class _Encoder:
    folder: Path
    buckets: int

    def one_bucket(self, bucket: int) -> _Shard:
        """Worker: sorts, de-duplicates, encodes and writes one bucket."""
        tokenizer = Tokenizer.load(str(self.folder / corpus.TOKENIZER))
        documents, duplicates = _read_bucket(self.folder / "buckets", bucket)
        shard = _Shard({}, {}, duplicates)
        for split in corpus.SPLITS:
            texts = [text for valid, text in documents if valid == (split == "valid")]
            if not texts:
                continue
            name = f"{split}-{bucket:05d}-of-{self.buckets:05d}.array_record"
            lengths = self._write(self.folder / name, texts, tokenizer)
            shard.lengths[split] = lengths
            shard.splits[split] = {
                "file": name,
                "documents": len(texts),
                "tokens": int(lengths.sum()),
                "bytes": sum(map(len, texts)),
                "size": (self.folder / name).stat().st_size,
                "sha256": corpus.sha256(self.folder / name),
            }
            if split == "valid":
                sizes = (len(gzip.compress(text, 9)) for text in texts)
                shard.splits[split]["gzip_bytes"] = sum(sizes)
        return shard

    @staticmethod
    def _write(path: Path, texts: list[bytes], tokenizer: Tokenizer) -> np.ndarray:
        """Writes the documents' records; returns the documents' lengths in tokens."""
        bos, eos = tokenizer.special.bos, tokenizer.special.eos
        dtype = corpus.token_dtype(tokenizer.vocabulary)
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:1")
        lengths = []
        for batch in _batches(texts, _ENCODE_BYTES):
            for tokens in tokenizer.encode([text.decode("utf-8") for text in batch]):
                document = np.array([bos, *tokens, eos], dtype)
                for start in range(0, len(document), corpus.RECORD_TOKENS):
                    writer.write(document[start : start + corpus.RECORD_TOKENS].tobytes())
                lengths.append(len(document))
        writer.close()
        return np.array(lengths, "<i4")


def _batches(texts: list[bytes], size: int) -> Iterator[list[bytes]]:
    batch, held = [], 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= size:
            yield batch
            batch, held = [], 0
    yield batch


def _manifest(recipe: Recipe, aside: Path, tokenizer: Tokenizer, counts, shards, files: int) -> dict:
    splits = {}
    for split in corpus.SPLITS:
        parts = [shard.splits[split] for shard in shards if split in shard.splits]
        lengths = [shard.lengths[split] for shard in shards if split in shard.lengths]
        if not parts:
            hint = "raise --valid_fraction" if split == "valid" else "lower --valid_fraction"
            raise UserError(f"no document is left for the {split} split; {hint} or give more text")
        name = f"{split}-lengths.int32"
        (aside / name).write_bytes(np.concatenate(lengths).tobytes())
        keys = ["documents", "tokens", "bytes"] + ["gzip_bytes"] * (split == "valid")
        splits[split] = {key: sum(part[key] for part in parts) for key in keys}
        splits[split] |= {"lengths": name, "lengths_sha256": corpus.sha256(aside / name), "shards": parts}
    identity = hashlib.sha256(tokenizer.model)
    for split in corpus.SPLITS:
        for part in splits[split]["shards"]:
            identity.update(part["sha256"].encode())
    return {
        "format": corpus.FORMAT,
        "identity": identity.hexdigest(),
        "vocabulary": tokenizer.vocabulary,
        "special": tokenizer.special.as_dict(),
        "tokenizer_sha256": tokenizer.sha256(),
        "files_read": files,
        "documents_read": counts.read,
        "documents_faulty": {kind: counts.faults[kind] for kind in readers.FAULTS},
        "documents_duplicate": sum(shard.duplicates for shard in shards),
        "splits": splits,
        "arguments": dataclasses.asdict(recipe),
        "dualsm": __version__,
    }
