"""Fuzzing targets: corpora, and input documents in every format."""

from __future__ import annotations

import csv
import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dualsm.data.build import Recipe, build
from dualsm.data.corpus import SPLITS, Corpus
from dualsm.data.tokenizer import Tokenizer
from dualsm.data.tokenizer_file import load_tokenizer
from tests.fuzzing.artifacts import Target, files_of, jsonl

FORMATS = (
    ".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".txt", ".bin", ".parquet", ".arrow, a stream",
    ".arrow, a file", "text, by blocks", ".csv, joined columns",
)  # fmt: skip
OPTIONS = {
    "text, by blocks": {"format": "text", "split": "blank"},
    ".csv, joined columns": {"text_key": "n,text"},
}


def make_corpus(scratch: Path, texts: list[str]) -> Path:
    """Builds a corpus of real text in an empty folder."""
    (scratch / "documents.jsonl").write_bytes(jsonl({"text": text} for text in texts))
    recipe = Recipe(input=str(scratch / "documents.jsonl"), vocab_size=384, valid_fraction=0.2)
    build(recipe, str(scratch / "corpus"), workers=1, quiet=True)
    return scratch / "corpus"


def targets(corpus: Path, texts: list[str], scratch: Path) -> dict[str, Target]:
    """Returns targets that read corpora, and documents in every format."""
    tokenizer, files = corpus / "tokenizer.model", files_of(corpus)
    documents = _documents(texts[:8], load_tokenizer(str(tokenizer)), scratch)
    return {
        "corpus": Target(files, _corpus_reader(corpus, verified=False)),
        "corpus, by its hashes": Target(files, _corpus_reader(corpus, verified=True)),
        "prepare, new tokenizer": Target(
            {"a.jsonl": jsonl({"text": t} for t in texts[:20])}, _preparer("a.jsonl", None)
        ),
        **{
            f"prepare {form}": Target(parts, _preparer(next(iter(parts)), tokenizer, **OPTIONS.get(form, {})))
            for form, parts in documents.items()
        },
    }


def _tokens(corpus: Corpus) -> list[list[int]]:
    read = []
    for split in SPLITS:
        documents = corpus.documents(split)
        read += [tokens.tolist() for tokens in documents.read(range(len(documents)))]
    return read


def _corpus_reader(original: Path, verified: bool) -> Callable[[Path], None]:
    expected = _tokens(Corpus(str(original)))

    def use(folder: Path) -> None:
        corpus = Corpus(str(folder))
        corpus.tokenizer()
        for split in SPLITS if verified else ():
            corpus.verify(split)
        assert _tokens(corpus) == expected, "a changed corpus was read without an error"

    return use


def _documents(texts: list[str], tokenizer: Tokenizer, scratch: Path) -> dict[str, dict[str, bytes]]:
    """Returns format -> files with the same documents; the file to prepare is the first."""
    import zstandard

    lines = jsonl({"text": text} for text in texts)
    formats = {
        ".jsonl": {"a.jsonl": lines},
        ".jsonl.gz": {"a.jsonl.gz": gzip.compress(lines)},
        ".jsonl.zst": {"a.jsonl.zst": zstandard.ZstdCompressor().compress(lines)},
        ".csv": {"a.csv": _csv(texts)},
        ".csv, joined columns": {"a.csv": _csv(texts)},
        "text, by blocks": {"a.log": "\n\n".join(texts).encode()},
        ".txt": {"a.txt": texts[1].encode(), "b.txt": texts[2].encode()},
        ".bin": _megatron(tokenizer.encode(texts)),
    }
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return formats
    table = pyarrow.table({"text": texts, "n": range(len(texts))})
    parquet.write_table(table, scratch / "a.parquet")
    with pyarrow.ipc.new_stream(str(scratch / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_file(str(scratch / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    return formats | {
        ".parquet": {"a.parquet": (scratch / "a.parquet").read_bytes()},
        ".arrow, a stream": {"a.arrow": (scratch / "a.arrow").read_bytes()},
        ".arrow, a file": {"a.arrow": (scratch / "b.arrow").read_bytes()},
    }


def _csv(texts: list[str]) -> bytes:
    content = io.StringIO()
    csv.writer(content).writerows([("n", "text"), *enumerate(texts)])
    return content.getvalue().encode()


def _megatron(documents: list[list[int]]) -> dict[str, bytes]:
    lengths = np.array([len(ids) for ids in documents], "<i4")
    places = (np.cumsum(lengths, dtype="<i8") - lengths) * 2
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(documents), len(documents) + 1)
    borders = np.arange(len(documents) + 1, dtype="<i8")
    index = header + lengths.tobytes() + places.tobytes() + borders.tobytes()
    return {"a.bin": np.concatenate(documents).astype("<u2").tobytes(), "a.idx": index}


def _preparer(name: str, tokenizer: Path | None, **options) -> Callable[[Path], None]:
    options |= {"tokenizer": str(tokenizer)} if tokenizer else {"vocab_size": 384}
    suffix = name[1:]

    def use(folder: Path) -> None:
        recipe = Recipe(
            input=str(folder / f"*{suffix}"), valid_fraction=0.3, max_bad_fraction=0.6,
            max_document_bytes=1 << 16, **options,
        )  # fmt: skip
        there = {path.name for path in folder.iterdir()}
        try:
            build(recipe, str(folder / "out"), workers=1, quiet=True)
        except Exception:
            assert {path.name for path in folder.iterdir()} == there, "a failed build left files behind"
            raise
        assert {path.name for path in folder.iterdir()} == there | {"out"}
        made = Corpus(str(folder / "out"))
        for split in SPLITS:
            made.verify(split)
        assert _tokens(made)

    return use
