"""Measures what `prepare` adds for near duplicates and decontamination: MB of text per second, and memory.

    python -m benchmarks.cleaning

The text is the source of the Python standard library. The index of near duplicates holds random signatures,
and the table of task texts random 13-grams.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from dualsm.data import inputs
from dualsm.data.bucket_files import Location
from dualsm.data.decontamination import TaskNgrams
from dualsm.data.near_duplicates import Document, Index, sign
from dualsm.data.recipe import Recipe
from dualsm.process import cli
from dualsm.process.progress import say

_DOCUMENTS = flags.DEFINE_integer("documents", 100_000, "documents in the index", lower_bound=1)
_MEGABYTES = flags.DEFINE_float("megabytes", 8, "text to process")
_NGRAMS = flags.DEFINE_integer("ngrams", 1_000_000, "13-grams of task texts", lower_bound=1)
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")


def seconds(work: Callable[[], object]) -> float:
    """Returns the CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def index_documents() -> dict:
    """Returns the memory and time per document of the index of near duplicates."""
    recipe, rng = Recipe("", vocab_size=384), np.random.default_rng(0)
    index = Index(recipe, Path())
    before = resident_bytes()

    def fill() -> None:
        for i in range(_DOCUMENTS.value):
            document = Document(rng.bytes(16), False, Location("000000-00000", i, 0))
            index.find_or_add(document, rng.integers(0, 2**32, 128, dtype=np.uint32))

    spent = seconds(fill)
    return {
        "index_bytes_per_document": (resident_bytes() - before) / _DOCUMENTS.value,
        "index_documents_per_second": _DOCUMENTS.value / spent,
    }


def read_texts() -> dict:
    """Returns MB of text per core second of signing and of looking up n-grams."""
    texts, size = [], 0
    for path in inputs.find_inputs(inputs.PYTHON_STDLIB):
        if size < _MEGABYTES.value * 1e6:
            texts.append(Path(path).read_text("utf-8", "ignore"))
            size += len(texts[-1].encode())
    words = np.random.default_rng(0).integers(0, 50_000, _NGRAMS.value + 12)
    ngrams = TaskNgrams.of({"random": [" ".join(map(str, words))]}, 13)
    signing = seconds(lambda: [sign(text.encode(), Recipe.near_words) for text in texts])
    lookup = seconds(lambda: [ngrams.matches(text) for text in texts])
    return {
        "megabytes": size / 1e6,
        "signing_mb_per_core_second": size / 1e6 / signing,
        "decontaminating_mb_per_core_second": size / 1e6 / lookup,
    }


def main(_: Sequence[str]) -> None:
    results = index_documents() | read_texts()
    say("\n".join(f"{name}: {value:,.1f}" for name, value in results.items()))
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
