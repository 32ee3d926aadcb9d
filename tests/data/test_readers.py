"""Documents come out of other people's formats as they went in; damaged files are refused in one line."""

import gzip
import json
import random
import struct

import numpy as np
import pytest
import zstandard

from dualsm.data import readers
from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.errors import UserError

TEXTS = ["first", "  second\twith tab", "third 🙂\nand a line", "naïve \x00"]
TYPES = {"<u2": 8, "<i4": 4, "<i8": 5}


def read(pattern, text_key="text", max_bytes=1 << 20, tokenizer="") -> list[str]:
    """Texts of all documents; faults by their kind in angle brackets."""
    found = []
    for path in readers.find_inputs(str(pattern)):
        for block in readers.read_blocks(path, text_key, max_bytes):
            assert block.first == sum(1 for text in found if text[0] == path) + 1
            for item in block.items:
                try:
                    found.append((path, readers.parse(item, block.form, text_key, tokenizer)))
                except readers.Fault as fault:
                    found.append((path, f"<{fault.kind}>"))
    return [text for _, text in found]


def write_arrow(path, texts, form):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    table = pyarrow.table({"n": range(len(texts)), "text": texts})
    new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_megatron(path, documents, dtype="<u2", split=2):
    """Documents as lists of ids, each in `split` sequences, as Megatron-LM's preprocessing writes them."""
    sequences = [part for ids in documents for part in np.array_split(np.array(ids, dtype), split)]
    lengths = np.array([len(part) for part in sequences], "<i4")
    places = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    borders = np.arange(0, len(sequences) + 1, split, dtype="<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, TYPES[dtype], len(sequences), len(borders))
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + places.tobytes() + borders.tobytes())
    path.write_bytes(b"".join(part.tobytes() for part in sequences))


ZSTD = zstandard.ZstdCompressor().compress
SKIPPED = struct.pack("<II", 0x184D2A50, 4) + b"size"  # a frame of no text, as pzstd writes before each other


@pytest.mark.parametrize(
    "parts", [[ZSTD], [SKIPPED, ZSTD, SKIPPED, ZSTD], [gzip.compress], [gzip.compress] * 2]
)
def test_a_compressed_file_is_read_whole_or_refused(tmp_path, parts):
    """Of one that is cut anywhere inside, no part passes for a smaller file."""
    texts = [f"{random.Random(i).getrandbits(400)}" for i in range(1500)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    coded = [part if part is SKIPPED else part(lines) for part in parts]
    path = tmp_path / ("a.jsonl.gz" if gzip.compress in parts else "a.jsonl.zst")
    path.write_bytes(b"".join(coded))
    assert read(path) == texts * sum(part is not SKIPPED for part in parts)
    whole, borders = path.read_bytes(), np.cumsum([0] + [len(part) for part in coded])
    places = {1, 5, *range(0, len(whole), len(whole) // 20), *(borders[:-1] + 3), *(borders[1:] - 1)}
    for place in sorted(places - set(borders.tolist())):
        path.write_bytes(whole[:place])
        with pytest.raises(UserError, match=f"cannot read .*{path.name}: "):
            read(path)


def test_the_end_of_a_name_says_how_a_file_is_read(tmp_path):
    folder = tmp_path / "books.jsonl.txts"
    folder.mkdir()
    (folder / "1.jsonl.txt").write_text("no JSON")
    assert read(folder / "*.txt") == ["no JSON"]


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow(tmp_path, form):
    texts = TEXTS * 3
    write_arrow(tmp_path / "a.arrow", [*texts, None], form)
    assert read(tmp_path / "a.arrow") == [*texts, "<empty_text>"]
    assert read(tmp_path / "a.arrow", max_bytes=6)[:2] == ["first", "<too_long>"]
    with pytest.raises(UserError, match="no column 'body' .it has n, text"):
        read(tmp_path / "a.arrow", text_key="body")
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path / "a.arrow", text_key="n")
    (tmp_path / "b.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:-900])
    with pytest.raises(UserError, match="b.arrow"):
        read(tmp_path / "b.arrow")


def test_what_blocks_account_for_adds_up_to_about_the_file(tmp_path):
    write_arrow(tmp_path / "a.arrow", TEXTS * 500, "stream")
    size = (tmp_path / "a.arrow").stat().st_size
    blocks = readers.read_blocks(str(tmp_path / "a.arrow"), "text", 1 << 20)
    assert 0.9 * size < sum(block.consumed for block in blocks) <= size


def test_a_saved_dataset_is_read_in_its_own_order(tmp_path):
    folder = tmp_path / "dataset" / "train"
    folder.mkdir(parents=True)
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for name, text in zip(names, TEXTS, strict=False):
        write_arrow(folder / name, [text], "stream")
    write_arrow(folder / "cache-123.arrow", ["not of the dataset"], "stream")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    assert read(folder) == TEXTS[:2]
    (tmp_path / "dataset" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match="several splits; give the folder of one"):
        read(tmp_path / "dataset")
    (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match="state.json is damaged"):
        read(folder)
    with pytest.raises(UserError, match="is a folder; give its files"):
        read(tmp_path)


@pytest.mark.parametrize("dtype", TYPES)
def test_megatron_documents_are_spelled_out_with_their_tokenizer(tmp_path, corpus_path, corpus, dtype):
    tokenizer = corpus.tokenizer()
    documents = [[*tokens, tokenizer.special.eos] for tokens in tokenizer.encode(TEXTS)]
    write_megatron(tmp_path / "a.bin", [*documents, []], dtype)
    path = str(corpus_path / "tokenizer.model")
    assert read(tmp_path / "a.bin", tokenizer=path) == [*TEXTS, "<empty_text>"]
    write_megatron(tmp_path / "b.bin", [documents[0], [tokenizer.vocabulary]], dtype)
    assert read(tmp_path / "b.bin", tokenizer=path) == [TEXTS[0], "<unknown_id>"]
    with pytest.raises(UserError, match="give it with --tokenizer"):
        read(tmp_path / "a.bin")


def test_ids_of_a_tokenizer_json_are_its_own(tmp_path, documents):
    from tests.exchange.conftest import make_tokenizer_json

    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra exchange)")
    text = make_tokenizer_json(documents[:100], seed=1)
    (tmp_path / "tokenizer.json").write_text(text)
    own = [e.ids for e in tokenizers.Tokenizer.from_str(text).encode_batch(TEXTS)]
    write_megatron(tmp_path / "a.bin", own)
    assert read(tmp_path / "a.bin", tokenizer=str(tmp_path / "tokenizer.json")) == TEXTS


def test_a_corpus_of_megatron_ids_holds_the_same_texts(tmp_path, corpus_path, corpus, documents):
    texts = list(dict.fromkeys(documents))[:60]
    write_megatron(tmp_path / "a.bin", corpus.tokenizer().encode(texts))
    recipe = Recipe(
        input=str(tmp_path / "a.bin"), tokenizer=str(corpus_path / "tokenizer.model"), valid_fraction=0.2
    )
    build(recipe, str(tmp_path / "corpus"), workers=1, quiet=True)
    made = Corpus(str(tmp_path / "corpus"))
    found = []
    for split in ("train", "valid"):
        documents_of = made.documents(split)
        found += [made.tokenizer().decode(tokens) for tokens in documents_of.read(range(len(documents_of)))]
    assert sorted(found) == sorted(texts)


def damage(case: str, path) -> None:
    index = path.with_suffix(".idx")
    content = index.read_bytes()
    if case == "no index":
        index.unlink()
    elif case == "short data":
        path.write_bytes(path.read_bytes()[:-1])
    elif case == "short index":
        index.write_bytes(content[:-8])
    elif case == "magic":
        index.write_bytes(b"X" + content[1:])
    elif case == "type":
        index.write_bytes(content[:17] + bytes([6]) + content[18:])
    elif case == "huge":
        index.write_bytes(content[:18] + b"\xff" * 8 + content[26:])
    elif case == "borders":
        index.write_bytes(content[:-8] + struct.pack("<q", 5))


DAMAGED = {
    "no index": "needs its index",
    "short data": "shorter than its index",
    "short index": "no index of a Megatron-LM dataset",
    "magic": "no index of a Megatron-LM dataset",
    "type": "no index of a Megatron-LM dataset",
    "huge": "no index of a Megatron-LM dataset",
    "borders": "no index of a Megatron-LM dataset",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_megatron_files_are_refused(tmp_path, case):
    write_megatron(tmp_path / "a.bin", [[17, 18, 19], [20]])
    damage(case, tmp_path / "a.bin")
    with pytest.raises(UserError, match=DAMAGED[case]):
        read(tmp_path / "a.bin", tokenizer="unused")
