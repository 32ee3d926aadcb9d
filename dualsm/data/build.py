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
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from dualsm import __version__
from dualsm.data import corpus, readers, round_trip
from dualsm.data.buckets import Counts, Scatter, read_bucket
from dualsm.data.recipe import Recipe
from dualsm.data.sentencepiece_tokenizer import train_tokenizer
from dualsm.data.tokenizer import Tokenizer
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.data.workers import in_order, pool_of
from dualsm.process.errors import UserError
from dualsm.process.output import new_folder
from dualsm.process.progress import bar, say

_BUCKET_BYTES = 32 << 20  # text a worker holds at once
_MINIMUM_BUCKETS = 8
_ENCODE_BYTES = 1 << 20  # text handed to SentencePiece at once


def build(recipe: Recipe, output: str, workers: int, quiet: bool = False) -> dict:
    """Writes the corpus folder `output` and returns its manifest.

    Args:
      recipe: what to build.
      output: folder to make; it must not exist, or hold a corpus of the same recipe and files, which is kept.
      workers: processes; 1 is this one alone.
      quiet: no progress bars, and no word of a corpus that is there already.

    Raises:
      UserError: for bad input, or when `output` holds something else.
    """
    recipe.check()
    target = Path(output).expanduser()
    train_files = readers.find_inputs(recipe.input)
    valid_files = readers.find_inputs(recipe.valid_input, "--valid_input") if recipe.valid_input else []
    inputs = _inputs(train_files, valid_files)
    if target.exists():
        manifest = _existing(recipe, target, inputs)
        if not quiet:
            say(f"{target} holds this corpus already; nothing was read")
        return manifest
    tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
    with new_folder(target, "--output") as aside, pool_of(workers) as pool:
        (aside / "buckets").mkdir()
        buckets = max(_MINIMUM_BUCKETS, -(-readers.unpacked_bytes(train_files) // _BUCKET_BYTES))
        scatter = Scatter(recipe, aside / "buckets", buckets)
        counts = scatter.run(pool, workers, train_files, valid_files, quiet)
        if tokenizer is None:
            tokenizer = _train(recipe, aside / "buckets", buckets, quiet)
        (aside / corpus.TOKENIZER).write_bytes(tokenizer.model)
        shards = _encode(pool, aside, buckets, tokenizer, counts, quiet)
        shutil.rmtree(aside / "buckets")
        manifest = _manifest(recipe, inputs, aside, tokenizer, counts, shards)
        (aside / corpus.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    if not quiet:
        round_trip.warn_of_losses(manifest["round_trip"])
    return manifest


def _inputs(train_files: list[str], valid_files: list[str]) -> dict:
    """What the manifest keeps of the input files, to tell them from others wherever they lie."""
    files = [("train", path) for path in train_files] + [("valid", path) for path in valid_files]
    known = sorted((split, Path(path).name, Path(path).stat().st_size) for split, path in files)
    digest = hashlib.sha256(json.dumps(known).encode())
    return {"files_read": len(known), "inputs_sha256": digest.hexdigest()}


def _existing(recipe: Recipe, target: Path, inputs: dict) -> dict:
    """The manifest in `target` when it was made by the same recipe of the same files; otherwise refuses."""
    try:
        manifest = json.loads((target / corpus.MANIFEST).read_text())
        made_by = dict(manifest["arguments"])
        if "inputs_sha256" in manifest:  # earlier versions know their files by these paths alone
            made_by |= {"input": recipe.input, "valid_input": recipe.valid_input}
        if "vocabulary" in made_by:  # the name of earlier versions
            made_by["vocab_size"] = made_by.pop("vocabulary")
        same_recipe = made_by == dataclasses.asdict(recipe)
        same_files = all(manifest.get(key, value) == value for key, value in inputs.items())
    except (OSError, ValueError, KeyError, TypeError):
        same_recipe = False
    if not same_recipe:
        raise UserError(
            f"--output={target} exists and was not made by this command; remove it or choose another"
        )
    if not same_files:
        raise UserError(
            f"--output={target} was made of {manifest['files_read']} files, and not of the "
            f"{inputs['files_read']} that --input means now (by name and size); remove it or choose another"
        )
    return manifest


# --- tokenizer and second pass: sort, encode, write ----------------------------------------------------


def _train(recipe: Recipe, folder: Path, buckets: int, quiet: bool) -> Tokenizer:
    """Trains the tokenizer on the first documents in hash order, which are a fair sample."""

    def sample() -> Iterator[str]:
        left = recipe.tokenizer_bytes
        for bucket in range(buckets):
            for valid, text in read_bucket(folder, bucket)[0]:
                if not valid and left > 0:
                    progress.update(len(text))
                    left -= len(text)
                    yield text.decode("utf-8")
            if left <= 0:
                return

    description = f"training a tokenizer of {recipe.vocab_size} ids"
    with bar(desc=description, unit="B", unit_scale=True, disable=quiet) as progress:
        return train_tokenizer(sample(), recipe.vocab_size)


@dataclasses.dataclass
class _Shard:
    """One bucket as written: per split a file, its numbers, and the documents' lengths and bytes.

    `round_trip` counts documents and bytes of the sample that was decoded again, over both splits.
    """

    splits: dict[str, dict]
    lengths: dict[str, np.ndarray]
    bytes: dict[str, np.ndarray]
    duplicates: int
    round_trip: collections.Counter


def _encode(
    pool, aside: Path, buckets: int, tokenizer: Tokenizer, counts: Counts, quiet: bool
) -> list[_Shard]:
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
        tokenizer = load_tokenizer(str(self.folder / corpus.TOKENIZER))
        documents, duplicates = read_bucket(self.folder / "buckets", bucket)
        shard = _Shard({}, {}, {}, duplicates, collections.Counter())
        for split in corpus.SPLITS:
            texts = [text for valid, text in documents if valid == (split == "valid")]
            if not texts:
                continue
            name = f"{split}-{bucket:05d}-of-{self.buckets:05d}.array_record"
            lengths = self._write(self.folder / name, texts, tokenizer)
            shard.round_trip += round_trip.verify(self.folder / name, texts, lengths, tokenizer)
            shard.lengths[split] = lengths
            shard.bytes[split] = np.array([len(text) for text in texts], "<i8")
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
        dtype = corpus.token_dtype(tokenizer.vocab_size)
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


def _manifest(
    recipe: Recipe, inputs: dict, aside: Path, tokenizer: Tokenizer, counts: Counts, shards: list[_Shard]
) -> dict:
    splits = {}
    for split in corpus.SPLITS:
        parts = [shard.splits[split] for shard in shards if split in shard.splits]
        lengths = [shard.lengths[split] for shard in shards if split in shard.lengths]
        name = f"{split}-lengths.int32"
        (aside / name).write_bytes(np.concatenate(lengths).tobytes())
        keys = ["documents", "tokens", "bytes"] + ["gzip_bytes"] * (split == "valid")
        splits[split] = {key: sum(part[key] for part in parts) for key in keys}
        splits[split] |= {"lengths": name, "lengths_sha256": corpus.sha256(aside / name), "shards": parts}
    bytes_N = np.concatenate([shard.bytes["valid"] for shard in shards if "valid" in shard.bytes])
    (aside / "valid-bytes.int64").write_bytes(bytes_N.tobytes())
    splits["valid"] |= {
        "document_bytes": "valid-bytes.int64",
        "document_bytes_sha256": corpus.sha256(aside / "valid-bytes.int64"),
    }
    identity = hashlib.sha256(tokenizer.model)
    for split in corpus.SPLITS:
        for part in splits[split]["shards"]:
            identity.update(part["sha256"].encode())
    return {
        "format": corpus.FORMAT,
        "identity": identity.hexdigest(),
        "vocabulary": tokenizer.vocab_size,
        "special": tokenizer.special.as_dict(),
        "tokenizer_sha256": tokenizer.sha256(),
        **inputs,
        "documents_read": counts.read,
        "documents_faulty": {kind: counts.faults[kind] for kind in readers.FAULTS},
        "documents_duplicate": sum(shard.duplicates for shard in shards),
        "round_trip": {
            "lossless": tokenizer.lossless,
            **{key: sum(shard.round_trip[key] for shard in shards) for key in round_trip.COUNTS},
        },
        "splits": splits,
        "arguments": dataclasses.asdict(recipe),
        "dualsm": __version__,
    }
