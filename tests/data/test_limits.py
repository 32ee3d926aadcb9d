"""Documents of several gigabytes are dropped in bounded memory."""

import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from dualsm.data.build import Recipe, build
from dualsm.evaluation.tasks import load_task
from dualsm.process.errors import UserError
from tests.conftest import ROOT, command_env

HUGE = 2 << 30  # bytes
MAX_MB = 24

# Reads a file with a limit of 1 MiB per document; prints the number of documents that are too long, the
# number of documents, and the growth of the process in MB.
READ = """
import resource, sys
from dualsm.data.readers import read_blocks

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
items = [item for block in read_blocks(sys.argv[1], "text", 1 << 20) for item in block.items]
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(items.count(None), len(items), grown)
"""


def sparse(path: Path, start: bytes = b"", size: int = HUGE) -> Path:
    """Writes a sparse file of zeros, which takes no disk space."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def gzip_compressed(path: Path) -> Path:
    """Writes a line of 256 MiB, compressed to a few hundred kB by gzip."""
    path.write_bytes(gzip.compress(b'{"text": "') + gzip.compress(b"a" * (32 << 20), 1) * 8)
    return path


def zstandard_compressed(path: Path) -> Path:
    """Writes the same line, compressed by zstandard."""
    compressor = zstandard.ZstdCompressor().compressobj()
    chunks = [compressor.compress(chunk) for chunk in (b'{"text": "', *[b"a" * (32 << 20)] * 8)]
    path.write_bytes(b"".join([*chunks, compressor.flush()]))
    return path


def token_ids(path: Path) -> Path:
    """Writes a Megatron-LM document of 2^30 ids."""
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 1, 2)
    path.with_suffix(".idx").write_bytes(header + struct.pack("<iqqq", HUGE // 2, 0, 0, 1))
    return sparse(path)


MAKERS = {
    "a.jsonl": lambda path: sparse(
        path, b'{"text": "short"}\n{"text": "', HUGE // 8
    ),  # smaller, because all of it is read
    "a.jsonl.gz": gzip_compressed,
    "a.jsonl.zst": zstandard_compressed,
    "a.txt": sparse,
    "a.bin": token_ids,
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_huge_document_is_not_loaded_into_memory(tmp_path, name):
    path = MAKERS[name](tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        cwd=ROOT, env=command_env(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    os.truncate(path, 0)
    assert done.returncode == 0, done.stderr
    too_long, documents, grown = done.stdout.split()
    assert (too_long, documents) == ("1", "2" if name == "a.jsonl" else "1")
    assert float(grown) < MAX_MB


def test_a_corpus_of_one_huge_document_raises(tmp_path):
    path = sparse(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"1 of 1 documents are unusable \(1 too_long\)"):
        build(Recipe(input=str(path), vocab_size=384), str(tmp_path / "corpus"), workers=1, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_huge_line_in_a_task_file_raises(tmp_path):
    sparse(tmp_path / "blimp.jsonl", b'{"sentence_good": "It is.", "sentence_bad": "It are."}\n')
    with pytest.raises(UserError, match="line 2: longer than 16 MiB"):
        load_task("blimp", tmp_path)


def test_long_values_of_a_column_are_none(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    from pyarrow import parquet

    from dualsm.data.columns import read_columns

    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["short", "x" * 5000, None, ""]}), path)
    values = [value for batch, _ in read_columns(path, "text", 4999, path) for value in batch]
    assert values == [b"short", None, b"", b""]
