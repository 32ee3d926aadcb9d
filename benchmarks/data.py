"""Measures data loading and preparation: tokens per second, time to the first batch, order, and `prepare`.

    python benchmarks/data.py --corpus=runs/corpus

Batches are read from the corpus by the pipeline that training uses, with one worker thread. The baseline
reads the same number of records without further processing, in the same rounds. `prepare` runs in one process
with an existing tokenizer on the text of --input; its baseline is SentencePiece encoding the same documents.
The order of --documents documents is computed in a process of its own, from simulated lengths.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm
from absl import flags
from grain.sources import ArrayRecordDataSource

from dualsm.data import inputs, readers
from dualsm.data.batches import BatchSource, OrderedDocuments, read_batches
from dualsm.data.build import Recipe, build
from dualsm.data.corpus import TOKENIZER, Corpus
from dualsm.data.document_lengths import GROUP_SIZE, RECORD_TOKENS, DocumentLengths, index_lengths
from dualsm.data.record_index import RecordIndex
from dualsm.data.sequence_order import SequenceOrder
from dualsm.process import cli
from dualsm.process.progress import say, table

_CORPUS = cli.DEFINE_path("corpus", None, "corpus written by `python -m dualsm.prepare`")
_INPUT = flags.DEFINE_string("input", inputs.PYTHON_STDLIB, "text for `prepare`; same syntax as its --input")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 7, "number of rounds; results are medians over the rounds", lower_bound=1
)
_PREPARES = flags.DEFINE_integer("prepares", 3, "rounds of `prepare`; 0 skips it", lower_bound=0)
_DOCUMENTS = flags.DEFINE_integer(
    "documents", 1_000_000_000, "documents with simulated lengths; 0 skips their order", lower_bound=0
)
_SECONDS = flags.DEFINE_float("seconds", 1.0, "seconds of reading per round")
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")
flags.mark_flags_as_required(["corpus"])

SHAPES = ((8, 2048), (128, 128))  # batch size, sequence length
FAR = 1_000_000  # steps
THREADS, PREFETCH = 1, 4


class Timing(NamedTuple):
    """Wall-clock seconds and CPU seconds of this process."""

    clock: float
    cores: float


def timed(work: Callable[[], object]) -> Timing:
    clock, cores = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - clock, time.process_time() - cores)


def batch_source(corpus: Corpus, batch_size: int, seq_len: int, steps: int) -> BatchSource:
    """Returns the batches of a run of `steps` steps, which repeats the corpus as often as necessary."""
    documents = corpus.documents("train")
    budget = steps * batch_size * seq_len
    order = SequenceOrder(documents.lengths, budget, seq_len, -(-budget // documents.tokens), seed=0)
    return BatchSource(
        [OrderedDocuments(documents, order)], batch_size, seq_len, pad=0, local_rows=range(batch_size)
    )


def records_of(source: BatchSource, step: int) -> int:
    """Returns the number of records that a step reads."""
    segments = source.corpora[0].order.segments(step * source.batch_size + np.arange(source.batch_size))
    return int(((segments.stop_S - 1) // RECORD_TOKENS - segments.start_S // RECORD_TOKENS + 1).sum())


def reading(corpus: Corpus, rows: int, seq_len: int) -> dict:
    """Returns tokens per second of the pipeline, and relative to reading the records only."""
    source = batch_source(corpus, rows, seq_len, FAR)
    batches = read_batches(source, 0, THREADS, PREFETCH)
    tokens = rows * seq_len

    def piped() -> float:
        start, steps = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < _SECONDS.value:
            next(batches)
            steps += 1
        return steps * tokens / seconds

    shards = corpus.manifest["splits"]["train"]["shards"]
    raw = ArrayRecordDataSource([str(corpus.folder / shard["file"]) for shard in shards])
    records, rng = records_of(source, 0), np.random.default_rng(0)

    def bare() -> float:
        start, steps = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < _SECONDS.value:
            for record in rng.integers(0, len(raw), records):
                raw[record]
            steps += 1
        return steps * tokens / seconds

    for _ in range(PREFETCH + 1):  # exclude the prefetched batches
        next(batches)
    pairs = [(piped(), bare()) for _ in range(_ROUNDS.value)]
    return {
        "rows": rows,
        "seq_len": seq_len,
        "tokens_per_second": statistics.median(ours for ours, _ in pairs),
        "of_bare_reading": statistics.median(ours / bare for ours, bare in pairs),
    }


def first_batches(corpus: Corpus) -> dict:
    """Returns the seconds from opening the corpus to the first batch, for step 0 and for a late step.

    At step 0 also with a verification of all hashes, in the background as in training, or before the batch.
    """
    rows, seq_len = SHAPES[0]

    def first(step: int) -> None:
        next(read_batches(batch_source(corpus, rows, seq_len, FAR + 2), step, THREADS, PREFETCH))

    def first_after(verify: Callable[[], None]) -> None:
        verify()
        first(0)

    first(0)
    background, before = [], []
    for _ in range(_ROUNDS.value):
        background.append(timed(lambda: first_after(corpus.start_verification)).clock)
        corpus.finish_verification()
        before.append(timed(lambda: first_after(lambda: corpus.verify("train"))).clock)
    pairs = [(timed(lambda: first(0)).clock, timed(lambda: first(FAR)).clock) for _ in range(_ROUNDS.value)]
    return {
        "verified_in_background_seconds": statistics.median(background),
        "verified_before_seconds": statistics.median(before),
        "first_step_seconds": statistics.median(near for near, _ in pairs),
        "far_step_seconds": statistics.median(far for _, far in pairs),
        "difference_seconds": statistics.median(far - near for near, far in pairs),
    }


def simulated_lengths(documents: int) -> DocumentLengths:
    """Returns lengths that are computed when they are read: log-normal, about 600 tokens on average."""
    base_G = np.exp(np.random.default_rng(0).normal(6, 0.9, GROUP_SIZE)).astype(np.int32) + 2
    groups = -(-documents // GROUP_SIZE)

    def read_groups(group_K: Sequence[int]) -> list[np.ndarray]:
        return [
            np.roll(base_G, 7919 * int(group))[: documents - int(group) * GROUP_SIZE] for group in group_K
        ]

    index_Mx3 = np.repeat(index_lengths(base_G), groups, axis=0)
    index_Mx3[-1] = index_lengths(read_groups([groups - 1])[0])
    return DocumentLengths(documents, index_Mx3, read_groups)


def memory_megabytes(field: str) -> float:
    """Returns a number in /proc/self/status; `ru_maxrss` would include the process that started this one."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) / 1024


def ordering(documents: int) -> dict:
    """Returns memory and seconds of the order of two passes; runs in a process of its own."""
    rows, seq_len = SHAPES[0]
    lengths = simulated_lengths(documents)
    before = memory_megabytes("VmRSS")

    def locate(order: SequenceOrder, records: RecordIndex, first: int) -> None:
        records.first(order.segments(first + np.arange(rows)).document_S)

    def begin(sequence: int) -> tuple[SequenceOrder, RecordIndex]:
        order = SequenceOrder(lengths, 2 * lengths.tokens, seq_len, 2, seed=0)
        opened = order, RecordIndex(lengths)
        locate(*opened, sequence)
        return opened

    border = -(-lengths.tokens // seq_len)  # the first sequence of the second pass
    first = timed(lambda: begin(0))
    far = timed(lambda: begin(border + border // 2)).clock
    opened = begin(border - 64 * rows)
    seconds = [timed(lambda i=i: locate(*opened, border + i * rows)).clock for i in range(-63, 64)]
    return {
        "documents": documents,
        "peak_megabytes": memory_megabytes("VmHWM") - before,
        "first_batch_seconds": first.clock,
        "first_batch_cpu_seconds": first.cores,
        "resumed_batch_seconds": far,
        "border_seconds": max(seconds),
        "batch_seconds": statistics.median(seconds),
    }


def texts_of(pattern: str) -> list[str]:
    """Returns the documents that `prepare` finds in the input, without unusable ones."""
    recipe, texts = Recipe(pattern), []
    for path in inputs.find_inputs(pattern):
        for block in readers.read_blocks(path, recipe.text_key, recipe.max_document_bytes):
            for item in block.items:
                try:
                    texts.append(readers.parse(item, block.form, recipe.text_key, ""))
                except readers.Fault:
                    continue
    return texts


def preparing(corpus: Corpus) -> dict:
    """Returns MB of text per second, of `prepare` and of SentencePiece encoding only."""
    path = str(corpus.folder / TOKENIZER)
    texts = texts_of(_INPUT.value)
    size = sum(len(text.encode()) for text in texts) / 1e6
    processor = spm.SentencePieceProcessor(model_file=path)
    pairs = []
    for _ in range(_PREPARES.value):
        encode = timed(lambda: processor.encode(texts, num_threads=1))
        with tempfile.TemporaryDirectory() as scratch:
            recipe = Recipe(_INPUT.value, tokenizer=path)
            prepare = timed(
                lambda recipe=recipe, scratch=scratch: build(recipe, f"{scratch}/corpus", 1, quiet=True)
            )
        pairs.append((prepare, encode))
    return {
        "megabytes": size,
        "prepare_mb_per_second": statistics.median(size / prepare.clock for prepare, _ in pairs),
        "prepare_mb_per_core_second": statistics.median(size / prepare.cores for prepare, _ in pairs),
        "encode_mb_per_core_second": statistics.median(size / encode.cores for _, encode in pairs),
        "of_encode_by_clock": statistics.median(encode.clock / prepare.clock for prepare, encode in pairs),
        "of_encode_by_core": statistics.median(encode.cores / prepare.cores for prepare, encode in pairs),
    }


def main(_: Sequence[str]) -> None:
    corpus = Corpus(_CORPUS.value, "--corpus")
    results = {"rows": [reading(corpus, *shape) for shape in SHAPES], "start": first_batches(corpus)}
    rows = [
        [
            f"{r['seq_len']} x {r['rows']}",
            f"{r['tokens_per_second'] / 1e6:.1f}",
            f"{r['of_bare_reading']:.2f}",
        ]
        for r in results["rows"]
    ]
    say(table(["sequence length x batch size", "million tokens/s", "over reading only"], rows))
    start = results["start"]
    say(
        f"first batch at step 0: {start['first_step_seconds']:.3f} s, at step {FAR:,}: "
        f"{start['far_step_seconds']:.3f} s; difference {start['difference_seconds']:+.3f} s\n"
        f"with verification in the background {start['verified_in_background_seconds']:.3f} s, before the "
        f"batch {start['verified_before_seconds']:.3f} s"
    )
    if _DOCUMENTS.value:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            r = results["order"] = pool.apply(ordering, [_DOCUMENTS.value])
        say(
            f"order of {r['documents']:,} documents: {r['peak_megabytes']:.0f} MB; first batch "
            f"{r['first_batch_seconds']:.2f} s (CPU {r['first_batch_cpu_seconds']:.2f} s), resumed in the "
            f"middle {r['resumed_batch_seconds']:.2f} s, between passes {r['border_seconds']:.2f} s, "
            f"others {r['batch_seconds'] * 1000:.2f} ms"
        )
    if _PREPARES.value:
        r = results["prepare"] = preparing(corpus)
        say(
            f"prepare: {r['prepare_mb_per_core_second']:.2f} MB per CPU second, encoding only "
            f"{r['encode_mb_per_core_second']:.2f}; ratio {r['of_encode_by_core']:.2f} in CPU time, "
            f"{r['of_encode_by_clock']:.2f} in wall-clock time ({r['megabytes']:.1f} MB of text)"
        )
    say(f"load {os.getloadavg()[0]:.1f}")
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps({"corpus": _CORPUS.value} | results, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
