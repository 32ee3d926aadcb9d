"""Measures the start of reading a corpus with many shards: seconds and opened shards to the first batch.

    python benchmarks/opening.py --corpus=runs/corpus

The training shards are links to one copy of the first training shard of the corpus.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from dualsm.data.batches import BatchSource, OrderedDocuments, read_batches
from dualsm.data.corpus import MANIFEST, Corpus
from dualsm.data.document_lengths import index_lengths, record_count
from dualsm.data.sequence_order import SequenceOrder
from dualsm.data.verification import sha256
from dualsm.process import cli
from dualsm.process.progress import say, table

_CORPUS = cli.DEFINE_path("corpus", None, "corpus written by `python -m dualsm.prepare`")
_SHARDS = flags.DEFINE_list("shards", ["10", "1000"], "numbers of training shards")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "number of rounds; seconds are medians over them", lower_bound=1)
flags.mark_flags_as_required(["corpus"])

BATCH_SIZE, SEQ_LEN = 8, 2048
_IN_OPEN, _IN_NONBLOCK = 0x20, 0o4000  # of inotify(7)


def write_copies(corpus: Corpus, shards: int, folder: Path) -> None:
    """Writes a corpus with the given number of training shards, all with the same content."""
    shutil.copytree(corpus.folder, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    split = manifest["splits"]["train"]
    entry = split["shards"][0]
    lengths_N = np.fromfile(folder / split["lengths"], "<i4")[: entry["documents"]]
    entry["records"] = int(record_count(lengths_N).sum())
    split["shards"] = [entry | {"file": f"copy-{shard:05d}.array_record"} for shard in range(shards)]
    for copied in split["shards"]:
        os.link(folder / entry["file"], folder / copied["file"])
    split |= {key: shards * entry[key] for key in ("documents", "tokens", "bytes")}
    lengths_N = np.tile(lengths_N, shards)
    split["lengths_index"] = "copy-lengths-index.int64"  # corpora of earlier versions have none
    for key, array in (("lengths", lengths_N), ("lengths_index", index_lengths(lengths_N))):
        (folder / split[key]).write_bytes(array.tobytes())
        split[f"{key}_sha256"] = sha256(folder / split[key])
    (folder / MANIFEST).write_text(json.dumps(manifest))


@contextlib.contextmanager
def opened_files(folder: Path) -> Iterator[Callable[[], list[str]]]:
    """Yields a function that returns the names of the files in a folder that were opened so far. Linux."""
    library = ctypes.CDLL(None, use_errno=True)
    descriptor = library.inotify_init1(_IN_NONBLOCK)
    if descriptor < 0 or library.inotify_add_watch(descriptor, os.fsencode(folder), _IN_OPEN) < 0:
        raise OSError(ctypes.get_errno(), "inotify", str(folder))
    names: list[str] = []

    def opened() -> list[str]:
        with contextlib.suppress(BlockingIOError):
            while events := os.read(descriptor, 1 << 20):
                while events:
                    *_, size = struct.unpack_from("iIII", events)
                    names.append(events[16 : 16 + size].rstrip(b"\0").decode())
                    events = events[16 + size :]
        return names

    try:
        yield opened
    finally:
        os.close(descriptor)


def starting(folder: Path) -> dict[str, float]:
    """Returns the seconds from opening a corpus to its first batch, and the shards that it opens."""

    def first_batch() -> None:
        documents = Corpus(str(folder)).documents("train")
        order = SequenceOrder(documents.lengths, documents.tokens, SEQ_LEN, 1, seed=0)
        corpora = [OrderedDocuments(documents, order)]
        next(read_batches(BatchSource(corpora, BATCH_SIZE, SEQ_LEN, 0, range(BATCH_SIZE)), 0, 1, 1))

    seconds, cpu_seconds = [], []
    for _ in range(_ROUNDS.value):
        with opened_files(folder) as opened:
            start, cpu_start = time.perf_counter(), time.process_time()
            first_batch()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
            shards = [name for name in opened() if name.endswith(".array_record")]
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "shards": len(set(shards)),
        "opens": len(shards),
    }


def main(_: Sequence[str]) -> None:
    corpus, rows = Corpus(_CORPUS.value, "--corpus"), []
    for shards in map(int, _SHARDS.value):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch).resolve() / "corpus"
            write_copies(corpus, shards, folder)
            r = starting(folder)
        rows.append([
            f"{shards:,}", f"{r['seconds']:.3f}", f"{r['cpu_seconds']:.3f}", f"{r['shards']:,}",
            f"{r['opens']:,}",
        ])  # fmt: skip
    say(table(["shards", "seconds to the first batch", "CPU seconds", "opened shards", "opens"], rows))
    say(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    cli.run(main)
