"""Reading Parquet, Arrow and Megatron-LM files."""

import json
import struct

import numpy as np
import pytest

from dualsm.data import readers
from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.process.errors import UserError
from tests.data.reading import TEXTS, read

DTYPES = {"<u2": 8, "<i4": 4, "<i8": 5}


def write_arrow(path, texts, form):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    table = pyarrow.table({"n": range(len(texts)), "text": texts})
    new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_megatron(path, documents, dtype="<u2", split=2):
    """Writes lists of token ids like Megatron-LM's preprocessing, with `split` sequences per document."""
    sequences = [sequence for ids in documents for sequence in np.array_split(np.array(ids, dtype), split)]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    boundaries = np.arange(0, len(sequences) + 1, split, dtype="<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, DTYPES[dtype], len(sequences), len(boundaries))
    arrays = (lengths, offsets, boundaries)
    path.with_suffix(".idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    path.write_bytes(b"".join(sequence.tobytes() for sequence in sequences))


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_files_are_read(tmp_path, form):
    texts = TEXTS * 3
    write_arrow(tmp_path / "a.arrow", [*texts, None], form)
    assert read(tmp_path / "a.arrow") == [*texts, "<empty_text>"]
    assert read(tmp_path / "a.arrow", max_bytes=6)[:2] == ["first", "<too_long>"]
    with pytest.raises(UserError, match="no column 'body'; set --text_key to one of 'n', 'text'"):
        read(tmp_path / "a.arrow", text_key="body")
    with pytest.raises(UserError, match="the column 'n' is not text .*set --text_key"):
        read(tmp_path / "a.arrow", text_key="n")
    (tmp_path / "b.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:-900])
    with pytest.raises(UserError, match="b.arrow"):
        read(tmp_path / "b.arrow")


def test_consumed_bytes_of_blocks_add_up_to_the_file_size(tmp_path):
    write_arrow(tmp_path / "a.arrow", TEXTS * 500, "stream")
    size = (tmp_path / "a.arrow").stat().st_size
    blocks = readers.read_blocks(str(tmp_path / "a.arrow"), "text", 1 << 20)
    assert 0.9 * size < sum(block.consumed for block in blocks) <= size


def test_a_saved_dataset_is_read_in_order(tmp_path):
    folder = tmp_path / "dataset" / "train"
    folder.mkdir(parents=True)
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for name, text in zip(names, TEXTS, strict=False):
        write_arrow(folder / name, [text], "stream")
    write_arrow(folder / "cache-123.arrow", ["not of the dataset"], "stream")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    assert read(folder) == TEXTS[:2]
    (tmp_path / "dataset" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match="several splits; pass one of them"):
        read(tmp_path / "dataset")
    (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match="state.json is damaged"):
        read(folder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_documents_are_decoded_with_the_given_tokenizer(tmp_path, corpus_path, corpus, dtype):
    tokenizer = corpus.tokenizer()
    documents = [[*tokens, tokenizer.special.eos] for tokens in tokenizer.encode(TEXTS)]
    write_megatron(tmp_path / "a.bin", [*documents, []], dtype)
    path = str(corpus_path / "tokenizer.model")
    assert read(tmp_path / "a.bin", tokenizer=path) == [*TEXTS, "<empty_text>"]
    write_megatron(tmp_path / "b.bin", [documents[0], [tokenizer.vocab_size]], dtype)
    assert read(tmp_path / "b.bin", tokenizer=path) == [TEXTS[0], "<unknown_id>"]
    with pytest.raises(UserError, match="pass --tokenizer=FILE"):
        read(tmp_path / "a.bin")


def test_megatron_ids_of_a_tokenizer_json_are_external_ids(tmp_path, documents):
    from tests.exchange.conftest import make_tokenizer_json

    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra exchange)")
    text = make_tokenizer_json(documents[:100], seed=1)
    (tmp_path / "tokenizer.json").write_text(text)
    external = [e.ids for e in tokenizers.Tokenizer.from_str(text).encode_batch(TEXTS)]
    write_megatron(tmp_path / "a.bin", external)
    assert read(tmp_path / "a.bin", tokenizer=str(tmp_path / "tokenizer.json")) == TEXTS


def test_a_corpus_from_megatron_files_has_the_same_texts(tmp_path, corpus_path, corpus, documents):
    texts = list(dict.fromkeys(documents))[:60]
    write_megatron(tmp_path / "a.bin", corpus.tokenizer().encode(texts))
    recipe = Recipe(
        input=str(tmp_path / "a.bin"), tokenizer=str(corpus_path / "tokenizer.model"), valid_fraction=0.2
    )
    build(recipe, str(tmp_path / "corpus"), workers=1, quiet=True)
    made = Corpus(str(tmp_path / "corpus"))
    found = []
    for split in ("train", "valid"):
        split_documents = made.documents(split)
        tokens_of = split_documents.read(range(len(split_documents)))
        found += [made.tokenizer().decode(tokens) for tokens in tokens_of]
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
    elif case == "dtype":
        index.write_bytes(content[:17] + bytes([6]) + content[18:])
    elif case == "huge":
        index.write_bytes(content[:18] + b"\xff" * 8 + content[26:])
    elif case == "boundaries":
        index.write_bytes(content[:-8] + struct.pack("<q", 5))


DAMAGED = {
    "no index": "cannot read .*, the index of",
    "short data": "shorter than its index",
    "short index": "damaged or not a Megatron-LM index",
    "magic": "damaged or not a Megatron-LM index",
    "dtype": "damaged or not a Megatron-LM index",
    "huge": "damaged or not a Megatron-LM index",
    "boundaries": "damaged or not a Megatron-LM index",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_megatron_files_raise(tmp_path, case):
    write_megatron(tmp_path / "a.bin", [[17, 18, 19], [20]])
    damage(case, tmp_path / "a.bin")
    with pytest.raises(UserError, match=DAMAGED[case]):
        read(tmp_path / "a.bin", tokenizer="unused")


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_nested_and_joined_columns_equal_those_of_json(tmp_path, form):
    """Rows of Parquet and Arrow give the same texts as the same objects in JSON."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    rows = [
        {"title": title, "data": {"text": text, "n": 1}, "a.b": "dotted"}
        for title, text in [("one", "first"), (None, "second"), ("three", ""), ("", None)]
    ]
    table = pyarrow.Table.from_pylist(rows)
    if form == "parquet":
        from pyarrow import parquet

        parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {
        "title,data.text": ["one\n\nfirst", "second", "three", "<empty_text>"],
        "data.text,title": ["first\n\none", "second", "three", "<empty_text>"],
        "a.b": ["dotted"] * 4,
        "a.b,title": ["dotted\n\none", "dotted", "dotted\n\nthree", "dotted"],
    }
    for text_key, texts in expected.items():
        assert read(tmp_path / f"a.{form}", text_key) == read(tmp_path / "a.jsonl", text_key) == texts
    assert read(tmp_path / f"a.{form}", "data.text")[:2] == ["first", "second"]
    assert read(tmp_path / f"a.{form}", "title,a.b", max_bytes=9)[0] == "<too_long>"
    with pytest.raises(
        UserError, match="no column 'data.body'; .* to one of 'title', 'data.text', 'data.n', 'a.b'"
    ):
        read(tmp_path / f"a.{form}", "title,data.body")
