"""Layouts of text data: fields of JSON, rows of CSV files, and ways to split text files."""

import csv
import dataclasses
import gzip
import io
import json
import pickle

import pytest

from dualsm.data.build import Recipe, build
from dualsm.data.faults import Fault
from dualsm.process.errors import UserError
from tests.data.reading import TEXTS, read

# Quotes, delimiters and line ends inside of values, and values that are empty.
VALUES = [*TEXTS, 'say "a,b"', "tab\tand, comma", "line\nand\r\nline\n", '"', "", " ", "é" * 300]


def write_rows(path, rows, end):
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows(rows)
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_are_read_as_they_were_written(tmp_path, name, end):
    rows = [["id", "text", "title"], *([number, value, "t"] for number, value in enumerate(VALUES))]
    write_rows(tmp_path / name, rows, end)
    expected = [value if value.strip() else "<empty_text>" for value in VALUES]
    assert read(tmp_path / name) == expected
    assert read(tmp_path / name, "title,text")[:2] == ["t\n\nfirst", f"t\n\n{VALUES[1]}"]
    with pytest.raises(
        UserError, match="has no column 'body'; set --text_key to one of 'id', 'text', 'title'"
    ):
        read(tmp_path / name, "body")
    long = read(tmp_path / name, max_bytes=599)
    assert long == [*expected[:-1], "<too_long>"]


def test_malformed_rows_are_faults_and_the_next_row_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbftext,n\none,1\nshort\n"bad"x,2\n\nlong,1,2\n' + "é,3\n".encode("latin-1") + b"two,4"
    )
    assert read(path) == ["one", "<bad_csv>", "<bad_csv>", "<bad_csv>", "<invalid_utf8>", "two"]
    path.write_bytes(b'text,n\none,1\n"' + b"line\n" * 300_000 + b'",2\ntwo,3\n')
    found = read(path, max_bytes=1 << 10)  # one fault per line: it could be an unpaired quote
    assert found == ["one", *["<too_long>"] * 300_001, "two"]
    assert read(path, max_bytes=1 << 21)[::2] == ["one", "two"]
    path.write_bytes(b'text,n\none,1\n"' + b"line\n" * 300_000)
    with pytest.raises(UserError, match="the file ends inside a quoted value"):
        read(path, max_bytes=1 << 10)
    path.write_bytes(b'text,n\none,1\n"two,2\n')
    with pytest.raises(UserError, match="cannot read .*a.csv: the file ends inside a quoted value"):
        read(path)


def test_quotes_of_tsv_files_are_text(tmp_path):
    texts = ['"foo', *(f"row {i}" for i in range(998)), 'bar "x" y"', '"quoted"']
    for end in ("\n", "\r\n"):
        rows = "".join(f"{i}\t{text}{end}" for i, text in enumerate(texts))
        (tmp_path / "a.tsv").write_bytes(f"id\ttext{end}{rows}".encode())
        assert read(tmp_path / "a.tsv") == texts
    long = '"' + "x" * (5 << 20)
    (tmp_path / "a.tsv").write_text(f"text\n{long}\nnext\n")
    assert read(tmp_path / "a.tsv") == ["<too_long>", "next"]


@pytest.mark.parametrize("last", ["bar", ",bar"])
def test_rows_that_an_unpaired_quote_joins_count_as_one_fault_per_line(tmp_path, last):
    rows = [',"foo', *(f"{i},row" for i in range(998)), f'1000,"{last}']
    (tmp_path / "a.csv").write_text("id,text\n" + "\n".join(rows) + "\n1001,good\n")
    assert read(tmp_path / "a.csv") == ["<bad_csv>"] * 1000 + ["good"]
    recipe = Recipe(str(tmp_path / "a.csv"), vocab_size=384)
    with pytest.raises(UserError, match="1000 of 1001 documents are unusable .1000 bad_csv.*raise --max_bad"):
        build(recipe, str(tmp_path / "out"), 1, quiet=True)


def test_faults_survive_the_way_between_processes():
    fault = pickle.loads(pickle.dumps(Fault("bad_csv", "detail")))
    assert (fault.kind, str(fault)) == ("bad_csv", "bad_csv: detail")


def test_fields_of_json_are_nested_and_joined(tmp_path):
    value = {"title": "T", "data": {"text": "B", "more": {"x": "X"}}, "data.text": "dotted", "n": None}
    cases = {
        "title": "T",
        "data.text": "dotted",
        "data.more.x": "X",
        "title,data.more.x": "T\n\nX",
        "n,title": "T",
        "n": "<no_text>",
        "data.more": "<no_text>",
        "title,missing": "T",
        "missing,n": "<empty_text>",
        "missing,none": "<no_text>",
        "title,data.more": "<no_text>",
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(value))
    (tmp_path / "b.json").write_text(json.dumps([value], indent=1))
    for text_key, text in cases.items():
        assert read(tmp_path / "a.jsonl", text_key) == read(tmp_path / "b.json", text_key) == [text]
    (tmp_path / "c.jsonl").write_text('{"a,b": "comma", "a": "A", "b": "B"}')
    assert read(tmp_path / "c.jsonl", "a,b") == ["comma"] and read(tmp_path / "c.jsonl", "b,a") == ["B\n\nA"]
    keys = "--text_key=x.y does not exist; the keys are 'title', 'data.text', 'data.more', 'data.text', 'n'"
    recipe = Recipe(str(tmp_path / "a.jsonl"), vocab_size=384, text_key="x.y")
    with pytest.raises(UserError, match=keys):
        build(recipe, str(tmp_path / "out"), 1, quiet=True)


@pytest.mark.parametrize(("text_key", "missing"), [("title,txet", "txet"), ("titel,text", "titel")])
def test_a_field_that_no_document_has_is_an_error(tmp_path, jsonl, text_key, missing):
    """Fields that some documents lack are left out, so a misspelled one would lose text silently."""
    texts = [json.loads(line) for line in jsonl.open()]
    documents = [{"title": f"T {i}"} | (text if i % 2 else {}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, documents)))
    recipe = Recipe(str(tmp_path / "a.jsonl"), vocab_size=384, text_key=text_key, max_bad_fraction=1.0)
    with pytest.raises(UserError, match=f"--text_key={text_key}: no JSON document has the field '{missing}'"):
        build(recipe, str(tmp_path / "out"), 1, quiet=True)
    (tmp_path / "b.txt").write_text("text without fields")
    mixed = dataclasses.replace(recipe, input=str(tmp_path / "*.*"))
    with pytest.raises(UserError, match=f"no JSON document has the field '{missing}'"):
        build(mixed, str(tmp_path / "out"), 1, quiet=True)
    assert not (tmp_path / "out").exists()
    right = dataclasses.replace(recipe, text_key="title,text", valid_fraction=0.2)
    build(right, str(tmp_path / "out"), 1, quiet=True)


def test_one_of_several_columns_with_a_name_must_be_chosen(tmp_path):
    write_rows(tmp_path / "a.csv", [["id", "text", "text"], ["1", "a", "b"]], "\n")
    with pytest.raises(UserError, match="a.csv has several columns 'text'; rename all but one"):
        read(tmp_path / "a.csv")
    assert read(tmp_path / "a.csv", "id") == ["1"]


def test_a_long_row_ends_where_a_reader_of_csv_ends_it(tmp_path):
    """A quotation mark inside of an unquoted value is text, and so are two in a quoted one."""
    long = "x" * (2 << 20)
    rows = [
        f'1,6" pipe {long}',
        '2,"a ""b"", c"',
        f'3,"{long}, ""quoted"""',
        "4,good",
        f'"5",5" {long}',
        '6,7" pipe',
    ]
    (tmp_path / "a.csv").write_text("id,text\n" + "\n".join(rows) + "\n")
    expected = ["<too_long>", 'a "b", c', "<too_long>", "good", "<too_long>", '7" pipe']
    assert read(tmp_path / "a.csv", max_bytes=1 << 10) == expected
    with_short = [row.replace(long, "") for row in rows]
    (tmp_path / "a.csv").write_text("id,text\n" + "\n".join(with_short) + "\n")
    assert read(tmp_path / "a.csv") == ['6" pipe ', 'a "b", c', ', "quoted"', "good", '5" ', '7" pipe']


def test_rows_with_much_other_text_are_too_long(tmp_path):
    """Memory is bounded by the row, not by the text."""
    write_rows(tmp_path / "a.csv", [["text", "n"], ["one", "x" * (5 << 20)], ["two", "x" * (3 << 20)]], "\n")
    assert read(tmp_path / "a.csv", max_bytes=1 << 20) == ["<too_long>", "two"]


def test_long_headers_are_cut_in_errors(tmp_path):
    write_rows(tmp_path / "a.csv", [["x" * 10_000, *map(str, range(100))]], "\n")
    with pytest.raises(UserError, match="has no column 'text'") as error:
        read(tmp_path / "a.csv")
    assert len(str(error.value)) < 300 + len(str(tmp_path))


TEXT = b"\xef\xbb\xbfone\n two \n\n \t\nthree\r\n\r\n\n\nfour"
SPLITS = {
    "line": ["one", " two ", "three", "four"],
    "blank": ["one\n two ", "three", "four"],
    "file": [TEXT[3:].decode()],
    "paragraphs": [TEXT[3:].decode()],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["a.txt", "a.train", "a.md", "a.txt.gz", "noextension"])
def test_text_files_are_split_into_documents(tmp_path, split, name):
    (tmp_path / name).write_bytes(gzip.compress(TEXT) if name.endswith("gz") else TEXT)
    options = {"split": split, "file_format": "text"}
    assert read(tmp_path / name, **options) == read(tmp_path, **options) == SPLITS[split]
    if split in ("line", "blank"):
        expected = [text if len(text) <= 6 else "<too_long>" for text in SPLITS[split]]
        assert read(tmp_path / name, max_bytes=10, **options) == expected


@pytest.mark.parametrize("space", ["\u00a0", "\u3000", "\u2003 \t"])
def test_lines_of_unicode_spaces_are_blank(tmp_path, space):
    (tmp_path / "a.txt").write_text(f"one\n{space}\ntwo{space}\n  {space}\n{space}\nthree\n")
    for split in ("line", "blank"):
        assert read(tmp_path / "a.txt", split=split) == ["one", f"two{space}", "three"]


def test_line_ends_do_not_count_as_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 10 + b"\r\n\r\n" + b"b" * 11 + b"\n\ncc\n" + b"d" * 7 + b"\n")
    for split, expected in (
        ("line", ["a" * 10, "<too_long>", "cc", "d" * 7]),
        ("blank", ["a" * 10, "<too_long>", "cc\nddddddd"]),
    ):
        assert read(tmp_path / "a.txt", split=split, max_bytes=10) == expected


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.train"])
def test_line_ends_of_old_macs_are_an_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"text\rone\rtwo\r")
    options = {} if name == "a.csv" else {"split": "line"}
    with pytest.raises(UserError, match=f"{name} ends its lines with CR alone; convert them to LF"):
        read(tmp_path / name, **options)
    (tmp_path / "a.txt").write_bytes(b"text\rone\r")
    assert read(tmp_path / "a.txt", split="file") == ["text\rone\r"]


def test_other_suffixes_need_a_format(tmp_path):
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(UserError, match="a.md has none of the suffixes .* --format=text reads any text"):
        read(tmp_path / "a.md")
    (tmp_path / "a.dump").write_text('{"text": "from JSON"}')
    assert read(tmp_path / "a.dump", file_format="json") == ["from JSON"]
    (tmp_path / "b.dump").write_text("text\nfrom CSV\n")
    assert read(tmp_path / "b.dump", file_format="csv") == ["from CSV"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "line"}, "--split=line splits text files, but the input has none"),
        ({"split": "lines"}, "--split=lines must be one of auto, paragraphs, line, blank, file"),
        ({"format": "xml"}, "--format=xml must be one of auto, text"),
        ({"near_words": 3}, "--near_words=3 has no effect; pass --deduplicate=near also, or remove it"),
        ({"near_similarity": 0.9}, "--near_similarity=0.9 has no effect; pass --deduplicate=near"),
        ({"decontaminate_words": 8}, "--decontaminate_words=8 has no effect; pass --decontaminate=FOLDER"),
        ({"near_similarity": 2.0, "deduplicate": "near"}, "--near_similarity=2.0 must be in"),
        ({"text_key": "a,,b"}, "--text_key='a,,b' has an empty name"),
    ],
)
def test_options_without_effect_or_meaning_are_rejected(tmp_path, options, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 3)
    with pytest.raises(UserError, match=message):
        build(
            Recipe(str(tmp_path / "a.jsonl"), vocab_size=384, **options), str(tmp_path / "out"), 1, quiet=True
        )
    assert not (tmp_path / "out").exists()
