"""Prepares a corpus from text: a tokenizer, ArrayRecord shards and a manifest.

python -m dualsm.prepare --input=python-stdlib --output=runs/corpus --vocab_size=2048
python -m dualsm.prepare --input='data/*.jsonl.gz' --output=runs/books --tokenizer=tokenizer.model
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from dualsm.data.build import Recipe, build
from dualsm.data.domains import FILE_DOMAIN
from dualsm.data.inputs import BABYLM_SUFFIXES, FORMATS, SUFFIXES
from dualsm.data.recipe import DEDUPLICATE
from dualsm.data.streams import COMPRESSIONS, SPLITS
from dualsm.devices.chips import usable_cores
from dualsm.process import cli

_INPUT = flags.DEFINE_string(
    "input",
    None,
    "python-stdlib, or comma-separated files, folders, globs and URLs (hf://, s3://, gs://, https://) with "
    f"the suffixes {' '.join(SUFFIXES)}; "
    f"text, JSON and CSV may be compressed ({' '.join(COMPRESSIONS)})",
)
_OUTPUT = cli.DEFINE_path("output", None, "folder to create")
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size",
    0,
    "vocabulary size of the SentencePiece tokenizer to train, a multiple of 128",
    lower_bound=0,
)
_TOKENIZER = cli.DEFINE_path("tokenizer", "", "tokenizer file to use instead of training a tokenizer")
_TOKENIZER_BYTES = flags.DEFINE_integer(
    "tokenizer_bytes", Recipe.tokenizer_bytes, "bytes of text to train the tokenizer on", lower_bound=1
)
_VALID_INPUT = flags.DEFINE_string("valid_input", "", "files to hold out, instead of a fraction of --input")
_VALID_FRACTION = flags.DEFINE_float(
    "valid_fraction",
    Recipe.valid_fraction,
    "fraction of documents to hold out, selected by a hash of their text",
)
_FORMAT = flags.DEFINE_enum(
    "format", Recipe.format, FORMATS, "format of the input files; auto: their suffixes determine it"
)
_SPLIT = flags.DEFINE_enum(
    "split",
    Recipe.split,
    ["auto", *SPLITS],
    "documents of a text file: its lines, its blocks between blank lines, the whole file, or paragraphs "
    "merged up to about 2 kB; auto: paragraphs for a single file and for "
    f"{', '.join(BABYLM_SUFFIXES)} files, otherwise the whole file",
)
_TEXT_KEY = flags.DEFINE_string(
    "text_key",
    Recipe.text_key,
    "JSON fields or columns that contain the text, joined by a blank line (title,body); a.b is field b of a",
)
_DOMAIN_KEY = flags.DEFINE_string(
    "domain_key",
    "",
    "JSON field or column with the domain of a held-out document, for held-out losses by domain; "
    f"{FILE_DOMAIN}: the name of its file",
)
_DEDUPLICATE = flags.DEFINE_enum(
    "deduplicate",
    Recipe.deduplicate,
    DEDUPLICATE,
    "drop documents that equal another document, or also near duplicates (extra dedup)",
)
_NEAR_SIMILARITY = flags.DEFINE_float(
    "near_similarity", Recipe.near_similarity, "minimum Jaccard similarity of near duplicates"
)
_NEAR_WORDS = flags.DEFINE_integer(
    "near_words", Recipe.near_words, "n-gram size in words, for the similarity", lower_bound=1
)
_DECONTAMINATE = flags.DEFINE_string(
    "decontaminate",
    "",
    "folders or files of evaluation tasks, as in `evaluate --task_data`; documents that overlap their texts "
    "are dropped",
)
_DECONTAMINATE_WORDS = flags.DEFINE_integer(
    "decontaminate_words",
    Recipe.decontaminate_words,
    "consecutive words in common that count as an overlap",
    lower_bound=1,
)
_MAX_DOCUMENT_BYTES = flags.DEFINE_integer(
    "max_document_bytes",
    Recipe.max_document_bytes,
    "drop documents with more bytes of text; in JSON the limit is on the line or object with all its fields, "
    "in .bin files on the number of token ids",
    lower_bound=1,
    upper_bound=1 << 31,
)
_MAX_BAD_FRACTION = flags.DEFINE_float(
    "max_bad_fraction", Recipe.max_bad_fraction, "maximum fraction of documents that may be unusable"
)
_WORKERS = flags.DEFINE_integer("workers", max(int(usable_cores()), 1), "number of processes", lower_bound=1)
flags.mark_flags_as_required(["input", "output"])


def main(_: Sequence[str]) -> None:
    if _VALID_INPUT.value:
        cli.check_flags({"--valid_input=": (_VALID_FRACTION,)}, "--valid_input=FILES")
    recipe = Recipe(
        input=_INPUT.value,
        valid_input=_VALID_INPUT.value,
        valid_fraction=_VALID_FRACTION.value,
        vocab_size=_VOCAB_SIZE.value,
        tokenizer=_TOKENIZER.value,
        tokenizer_bytes=_TOKENIZER_BYTES.value,
        text_key=_TEXT_KEY.value,
        max_document_bytes=_MAX_DOCUMENT_BYTES.value,
        max_bad_fraction=_MAX_BAD_FRACTION.value,
        format=_FORMAT.value,
        split=_SPLIT.value,
        deduplicate=_DEDUPLICATE.value,
        near_similarity=_NEAR_SIMILARITY.value,
        near_words=_NEAR_WORDS.value,
        decontaminate=_DECONTAMINATE.value,
        decontaminate_words=_DECONTAMINATE_WORDS.value,
        domain_key=_DOMAIN_KEY.value,
    )
    task_texts = _read_task_texts(recipe.decontaminate) if recipe.decontaminate else None
    manifest = build(recipe, _OUTPUT.value, _WORKERS.value, task_texts=task_texts)
    for name, split in manifest["splits"].items():
        print(
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
            f"{split['bytes']:,} bytes ({split['bytes'] / split['tokens']:.2f} bytes per token)"
        )
    if domains := manifest["splits"]["valid"].get("domains"):
        print("held-out documents: " + ", ".join(f"{name} {count:,}" for name, count in domains.items()))
    faulty = sum(manifest["documents_faulty"].values())
    print(f"dropped {manifest['documents_duplicate']:,} duplicates and {faulty:,} unusable documents")
    if recipe.deduplicate == "near":
        print(f"dropped {manifest['documents_near_duplicate']:,} near duplicates")
    if recipe.decontaminate:
        overlaps = manifest["documents_contaminated"]
        files = sum(count > 0 for count in overlaps["by_task_file"].values())
        print(
            f"dropped {overlaps['all']:,} documents that overlap {files} of "
            f"{len(overlaps['by_task_file'])} task files"
        )
        if skipped := manifest.get("task_texts_skipped"):
            print(f"ignored {skipped:,} task texts that are too short to be compared")
    print(f"wrote {_OUTPUT.value} with a vocabulary of {manifest['vocabulary']:,} ids")


def _read_task_texts(paths: str) -> dict[str, list[str]]:
    from dualsm.evaluation.task_texts import read_task_texts  # imports JAX, which takes seconds

    return read_task_texts(paths)


if __name__ == "__main__":
    cli.run(main)
