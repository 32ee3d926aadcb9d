"""Builds a corpus from text, in bounded memory, with several worker processes.

Documents are sorted by a hash of their text. Sorting shuffles the documents and makes duplicates neighbors;
another part of the same hash selects the held-out documents.

    inputs -> blocks of documents -> [workers: parse, hash] -> buckets by hash, on disk
           -> near duplicates removed, if requested
           -> tokenizer, trained on the first buckets
           -> [workers: sort a bucket, deduplicate, encode] -> one shard per bucket

All files are written to a temporary folder beside the output, which is renamed when it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from dualsm import __version__
from dualsm.data import corpus, inputs, near_duplicates, round_trip
from dualsm.data.bucket_files import read_bucket
from dualsm.data.buckets import NGRAMS, Counts, Scatter
from dualsm.data.damaged_corpus import DamagedCorpus
from dualsm.data.decontamination import TaskNgrams
from dualsm.data.document_lengths import index_lengths
from dualsm.data.domains import WITHOUT_FIELDS, check_formats
from dualsm.data.faults import FAULTS
from dualsm.data.recipe import Recipe
from dualsm.data.sentencepiece_tokenizer import train_tokenizer
from dualsm.data.shards import Shard, write_shards
from dualsm.data.tokenizer import Tokenizer
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.data.verification import sha256
from dualsm.data.workers import worker_pool
from dualsm.process.errors import UserError
from dualsm.process.output import is_empty_folder, new_folder, remove_interrupted_upload
from dualsm.process.paths import user_path
from dualsm.process.progress import bar, say
from dualsm.process.urls import file_name, without_queries

_BUCKET_BYTES = 32 << 20  # approximate text per bucket; each worker loads one bucket
_MIN_BUCKETS = 8


def build(
    recipe: Recipe,
    output: str,
    workers: int,
    quiet: bool = False,
    task_texts: Mapping[str, Sequence[str]] | None = None,
) -> dict:
    """Writes a corpus and returns its manifest.

    Args:
      recipe: the input and its processing.
      output: folder to create; may exist if it is empty. An existing corpus of the same recipe and files is
        kept.
      workers: number of processes; 1: only this process.
      quiet: show no progress bars and no messages.
      task_texts: texts of tasks by the names of their files, with `recipe.decontaminate`
        (`evaluation.task_texts.read_task_texts`).

    Raises:
      UserError: for invalid input, or if `output` exists and is not the same corpus or is damaged.
    """
    recipe.check()
    if bool(recipe.decontaminate) != bool(task_texts):
        raise ValueError("recipe.decontaminate and task_texts must be given together")
    if recipe.deduplicate == "near":
        near_duplicates.check_installed()
    ngrams = TaskNgrams.of(task_texts, recipe.decontaminate_words) if task_texts else None
    target = user_path(output)
    train_files = inputs.find_inputs(recipe.input, "--input", recipe.format, quiet)
    valid_files = []
    if recipe.valid_input:
        valid_files = inputs.find_inputs(recipe.valid_input, "--valid_input", recipe.format, quiet)
        # A text file is divided into other documents in --valid_input than among several files of --input.
        held_out = set(map(inputs.absolute_path, valid_files))
        train_files = [path for path in train_files if inputs.absolute_path(path) not in held_out]
        if not train_files:
            raise UserError(
                f"no documents to train on: --valid_input contains all files of --input={recipe.input}; "
                "remove some of them from --valid_input"
            )
    formats = {inputs.format_of(path, recipe.format) for path in train_files + valid_files}
    if recipe.split != "auto" and "text" not in formats:
        raise UserError(
            f"--split={recipe.split} splits text files, but the input has none; pass --format=text or "
            "remove --split"
        )
    if recipe.text_key != Recipe.text_key and formats <= {*WITHOUT_FIELDS}:
        raise UserError(
            f"--text_key={recipe.text_key} names fields or columns, but the input has none; pass "
            "--format=json or csv, or remove --text_key"
        )
    held_out_files, flag = (valid_files, "--valid_input") if valid_files else (train_files, "--input")
    held_out_formats = {inputs.format_of(path, recipe.format) for path in held_out_files}
    check_formats(recipe.domain_key, held_out_formats, flag)
    fingerprint = _fingerprint(train_files, valid_files) | (
        {"tasks_sha256": ngrams.sha256()} if ngrams else {}
    )
    remove_interrupted_upload(target, corpus.MANIFEST)
    if target.exists() and not is_empty_folder(target):
        manifest = _existing_manifest(recipe, target, fingerprint)
        _check_files(target)
        if not quiet:
            say(f"{target} already contains this corpus; nothing to do")
        return manifest
    tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
    with new_folder(target, "--output", last=corpus.MANIFEST) as folder, worker_pool(workers) as pool:
        (folder / "buckets").mkdir()
        buckets = max(_MIN_BUCKETS, -(-inputs.estimated_text_bytes(train_files, quiet) // _BUCKET_BYTES))
        scatter = Scatter(recipe, folder / "buckets", buckets, fingerprint.get("tasks_sha256", ""))
        if ngrams:
            ngrams.save(folder / "buckets" / NGRAMS)
        counts = scatter.run(pool, workers, train_files, valid_files, quiet)
        near = 0
        if recipe.deduplicate == "near":
            report = folder / near_duplicates.REPORT
            near = near_duplicates.remove_near_duplicates(
                recipe, folder / "buckets", buckets, report, pool, quiet
            )
        if tokenizer is None:
            tokenizer = _train_tokenizer(recipe, folder / "buckets", buckets, quiet)
        (folder / corpus.TOKENIZER).write_bytes(tokenizer.model)
        shards = write_shards(pool, folder, buckets, counts.bytes, quiet)
        shutil.rmtree(folder / "buckets")
        manifest = _manifest(recipe, fingerprint, folder, tokenizer, counts, shards)
        if recipe.deduplicate == "near":
            manifest["documents_near_duplicate"] = near
        if ngrams:
            by_file = {name: counts.contaminated_by[index] for index, name in enumerate(ngrams.files)}
            manifest["documents_contaminated"] = {"all": counts.contaminated, "by_task_file": by_file}
            manifest["task_texts_skipped"] = ngrams.skipped
        (folder / corpus.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    if not quiet:
        round_trip.warn_of_losses(manifest["round_trip"])
    return manifest


def _fingerprint(train_files: list[str], valid_files: list[str]) -> dict:
    """Returns manifest entries that identify the input files by name and size."""
    files = [("train", path) for path in train_files] + [("valid", path) for path in valid_files]
    sizes = [size for size, *_ in inputs.file_versions([path for _, path in files])]
    names = [(split, file_name(path)) for split, path in files]
    known = sorted((*name, size) for name, size in zip(names, sizes, strict=True))
    digest = hashlib.sha256(json.dumps(known).encode())
    return {"files_read": len(known), "inputs_sha256": digest.hexdigest()}


def _existing_manifest(recipe: Recipe, target: epath.Path, fingerprint: dict) -> dict:
    """Returns the manifest in `target`. Raises `UserError` if the recipe or its files differ."""
    try:
        manifest = json.loads((target / corpus.MANIFEST).read_text())
        defaults = {f.name: f.default for f in dataclasses.fields(Recipe) if f.name != "input"}
        arguments = dict(manifest["arguments"])
        if "inputs_sha256" in manifest:  # earlier versions identify the files by these paths only
            arguments |= {"input": recipe.input, "valid_input": recipe.valid_input}
        if bool(arguments.get("decontaminate")) == bool(recipe.decontaminate):
            arguments["decontaminate"] = recipe.decontaminate  # the hash of their n-grams is compared
        if "vocabulary" in arguments:  # the key in earlier versions
            arguments["vocab_size"] = arguments.pop("vocabulary")
        same_recipe = defaults | arguments == dataclasses.asdict(recipe)  # earlier versions lack options
        same_recipe &= manifest["format"] == corpus.FORMAT
        same_files = all(
            manifest.get(key, value) == value for key, value in fingerprint.items() if key != "tasks_sha256"
        )
    except (OSError, ValueError, KeyError, TypeError):
        same_recipe = False
    if not same_recipe:
        raise UserError(
            f"--output={target} exists and was not created by this command; remove it or choose another"
        )
    if manifest.get("tasks_sha256") != fingerprint.get("tasks_sha256"):
        raise UserError(
            f"--output={target} was created with other task files in --decontaminate; remove it or choose "
            "another"
        )
    if not same_files:
        raise UserError(
            f"--output={target} was created from {manifest['files_read']} input files that differ in name or "
            f"size from the {fingerprint['files_read']} files given now; remove it or choose another"
        )
    if recipe.tokenizer and _has_changed(recipe.tokenizer, manifest.get("tokenizer_sha256")):
        raise UserError(
            f"--output={target} was created before --tokenizer={recipe.tokenizer} changed; remove it or "
            "choose another"
        )
    return manifest


def _has_changed(path: str, expected: str | None) -> bool:
    """Returns True if a file can be read and its hash differs from the expected one, if that is known."""
    try:
        return expected is not None and sha256(user_path(path)) != expected
    except OSError:
        return False


def _check_files(target: epath.Path) -> None:
    """Raises `UserError` if files of an existing corpus are missing or damaged. Reads no shard."""
    try:
        corpus.Corpus(str(target)).check_small_files()
    except DamagedCorpus as error:
        raise UserError(
            f"--output={target} holds a damaged copy of this corpus ({error.damage}); remove it and run the "
            "same command again"
        ) from error


def _train_tokenizer(recipe: Recipe, folder: Path, buckets: int, quiet: bool) -> Tokenizer:
    """Trains the tokenizer on the first documents in hash order, which are a random sample."""

    def sample() -> Iterator[str]:
        remaining = recipe.tokenizer_bytes
        for bucket in range(buckets):
            for held_out, text in read_bucket(folder, bucket)[0]:
                if not held_out and remaining > 0:
                    progress.update(len(text))
                    remaining -= len(text)
                    yield text.decode("utf-8")
            if remaining <= 0:
                return

    description = f"training a tokenizer of {recipe.vocab_size} ids"
    with bar(desc=description, unit="B", unit_scale=True, disable=quiet) as progress:
        return train_tokenizer(sample(), recipe.vocab_size)


def _write_domains(folder: Path, names: list[str]) -> dict:
    """Writes the domains of the held-out documents; returns their manifest entries."""
    domains, domain_N, count_D = np.unique(names, return_inverse=True, return_counts=True)
    path = folder / "valid-domains.uint16"
    path.write_bytes(domain_N.astype("<u2").tobytes())
    return {
        "domains": dict(zip(domains.tolist(), count_D.tolist(), strict=True)),
        "document_domains": path.name,
        "document_domains_sha256": sha256(path),
    }


def _manifest(
    recipe: Recipe, fingerprint: dict, folder: Path, tokenizer: Tokenizer, counts: Counts, shards: list[Shard]
) -> dict:
    """Returns the manifest, and writes the lengths and sizes of the documents."""
    # Queries of URLs may contain credentials.
    recipe = dataclasses.replace(
        recipe, input=without_queries(recipe.input), valid_input=without_queries(recipe.valid_input)
    )
    splits = {}
    for split in corpus.SPLITS:
        entries = [shard.splits[split] for shard in shards if split in shard.splits]
        lengths_N = np.concatenate([shard.lengths[split] for shard in shards if split in shard.lengths])
        name, index = f"{split}-lengths.int32", f"{split}-lengths-index.int64"
        (folder / name).write_bytes(lengths_N.tobytes())
        (folder / index).write_bytes(index_lengths(lengths_N).tobytes())
        keys = ["documents", "tokens", "bytes", "words"] + ["gzip_bytes"] * (split == "valid")
        splits[split] = {key: sum(entry[key] for entry in entries) for key in keys}
        splits[split] |= {"lengths": name, "lengths_sha256": sha256(folder / name)}
        splits[split] |= {"lengths_index": index, "lengths_index_sha256": sha256(folder / index)}
        splits[split]["shards"] = entries
    bytes_N = np.concatenate([shard.bytes["valid"] for shard in shards if "valid" in shard.bytes])
    (folder / "valid-bytes.int64").write_bytes(bytes_N.tobytes())
    splits["valid"] |= {
        "document_bytes": "valid-bytes.int64",
        "document_bytes_sha256": sha256(folder / "valid-bytes.int64"),
    }
    if recipe.domain_key:
        splits["valid"] |= _write_domains(folder, [name for shard in shards for name in shard.domains])
    identity = hashlib.sha256(tokenizer.model)
    for split in corpus.SPLITS:
        for entry in splits[split]["shards"]:
            identity.update(entry["sha256"].encode())
    return {
        "format": corpus.FORMAT,
        "identity": identity.hexdigest(),
        "vocabulary": tokenizer.vocab_size,
        "special": tokenizer.special.as_dict(),
        "tokenizer_sha256": tokenizer.sha256(),
        **fingerprint,
        "documents_read": counts.read,
        "documents_faulty": {kind: counts.faults[kind] for kind in FAULTS},
        "documents_duplicate": sum(shard.duplicates for shard in shards),
        "round_trip": {
            "lossless": tokenizer.lossless,
            **{key: sum(shard.round_trip[key] for shard in shards) for key in round_trip.COUNTS},
        },
        "splits": splits,
        "arguments": dataclasses.asdict(recipe),
        "dualsm": __version__,
    }
