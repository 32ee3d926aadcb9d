"""Reading text and JSON: compression, encodings, damaged files, and splitting into documents."""

import bz2
import codecs
import gzip
import json
import lzma
import random
import struct

import numpy as np
import pytest
import zstandard

from dualsm.data import readers
from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.process.errors import UserError
from tests.data.reading import read

ZSTD = zstandard.ZstdCompressor().compress
LINE = '{"text": "é"}\n'.encode()
SKIPPED = struct.pack("<II", 0x184D2A50, 4) + b"size"  # a skippable frame, as pzstd writes before each frame


@pytest.mark.parametrize(
    ("suffix", "frames"),
    [
        ("zst", [ZSTD]),
        ("zst", [SKIPPED, ZSTD, SKIPPED, ZSTD]),
        ("gz", [gzip.compress]),
        ("gz", [gzip.compress] * 2),
        ("bz2", [bz2.compress] * 2),
        ("xz", [lzma.compress] * 2),
    ],
)
def test_a_truncated_compressed_file_raises(tmp_path, suffix, frames):
    """Truncation inside any frame is an error, not the end of the file."""
    texts = [f"{random.Random(i).getrandbits(400)}" for i in range(1500)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    compressed = [frame if frame is SKIPPED else frame(lines) for frame in frames]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(b"".join(compressed))
    assert read(path) == texts * sum(frame is not SKIPPED for frame in frames)
    content, ends = path.read_bytes(), np.cumsum([0] + [len(frame) for frame in compressed])
    sizes = {1, 5, *range(0, len(content), len(content) // 20), *(ends[:-1] + 3), *(ends[1:] - 1)}
    for size in sorted(sizes - set(ends.tolist())):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=f"cannot read .*{path.name}: "):
            read(path)


def test_a_damaged_second_frame_raises(tmp_path):
    for compress, suffix in (
        (bz2.compress, "bz2"),
        (lzma.compress, "xz"),
        (gzip.compress, "gz"),
        (ZSTD, "zst"),
    ):
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(LINE) + b"x" + compress(LINE)[1:])
        with pytest.raises(UserError, match="cannot read"):
            read(tmp_path / f"a.jsonl.{suffix}")


def test_compression_is_detected_by_content(tmp_path):
    for number, compress in enumerate([bz2.compress, lzma.compress, gzip.compress, ZSTD]):
        path = tmp_path / f"{number}.jsonl{'.gz' * (number % 2)}"
        path.write_bytes(compress(LINE))
        assert read(path) == ["é"]


def test_large_zstandard_windows_are_supported(tmp_path):
    """`zstd --long=30` writes such files; by default, zstandard rejects windows above 128 MiB."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compressor.compress(LINE) + compressor.flush())
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    assert read(path) == ["é"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"PK\x03\x04....", "ZIP"), (b"\x04\x22\x4d\x18..", "LZ4"), (b"PAR1....", "Parquet")],
)
def test_files_of_other_formats_raise_with_the_format(tmp_path, content, kind):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt is .*{kind}"):
        read(tmp_path / "a.txt")


# --- encodings ---

SAMPLES = {
    "a letter": "x",
    "English": "Plain words and nothing else.",
    "Russian": "Съешь же ещё этих мягких французских булок.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
}


@pytest.mark.parametrize("form", ["txt", "jsonl", "jsonl.gz", "json"])
def test_byte_order_marks_are_stripped(tmp_path, form):
    for name in ("a", "b"):
        content = codecs.BOM_UTF8 + (b"first" if form == "txt" else b'{"text": "first"}\n')
        (tmp_path / f"{name}.{form}").write_bytes(gzip.compress(content) if form.endswith("gz") else content)
    assert read(tmp_path / f"*.{form}") == ["first"] * 2


def test_byte_order_marks_inside_concatenated_files_are_stripped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes((codecs.BOM_UTF8 + b'{"text": "first"}\n') * 2)
    assert read(tmp_path / "a.jsonl") == ["first"] * 2


@pytest.mark.parametrize("language", SAMPLES)
@pytest.mark.parametrize("form", ["txt", "jsonl"])
@pytest.mark.parametrize(
    ("encoding", "name"),
    [(f"utf-{bits}{order}", f"UTF-{bits}") for bits in (16, 32) for order in ("", "-le", "-be")],
)
def test_utf16_and_utf32_raise_with_the_encoding(tmp_path, language, form, encoding, name):
    text = SAMPLES[language] + "\n"
    lines = text if form == "txt" else json.dumps({"text": text}, ensure_ascii=False) + "\n"
    (tmp_path / f"a.{form}").write_bytes(lines.encode(encoding))
    with pytest.raises(UserError, match=rf"a\.{form} is encoded in {name}; convert it to UTF-8"):
        read(tmp_path / f"a.{form}")


def test_iso_2022_raises_with_the_encoding(tmp_path):
    for encoding in ("iso2022_jp", "iso2022_kr"):
        (tmp_path / "a.txt").write_bytes(
            "日本語 한국어"[: 3 if encoding.endswith("jp") else None][-3:].encode(encoding)
        )
        with pytest.raises(UserError, match="ISO-2022"):
            read(tmp_path / "a.txt")


def test_unusual_characters_are_not_detected_as_another_encoding(tmp_path):
    for text in ("naïve \x00", "a\nb\nc\nd\n", "a\tb\tc\td\t", "\x1b[1mbold\x1b(B\n", "+/version", "~{x~}"):
        (tmp_path / "a.txt").write_bytes(text.encode())
        assert read(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize(
    ("text", "encoding", "guess"),
    [
        ("déjà vu, naïve café", "latin-1", "Latin-1"),
        ("Съешь ещё этих булок", "cp1251", "Windows-1251"),
        ("吾輩は猫である。名前はまだ無い。", "shift_jis", "Shift_JIS"),
    ],
)
def test_invalid_utf8_is_reported_with_a_guess_of_the_encoding(text, encoding, guess):
    for form, item in (("text", text.encode(encoding)), ("jsonl", f'{{"text": "{text}"}}'.encode(encoding))):
        with pytest.raises(readers.Fault, match=f"invalid_utf8: .*{guess}"):
            readers.parse(item, form, "text")
    damaged = "日本語日本語".encode()[:-1]
    with pytest.raises(readers.Fault, match="damaged UTF-8"):
        readers.parse(damaged, "text", "text")


# --- JSON ---

ODD_FIELDS = {
    "digits": "1" * 5000,
    "exponent": "1e99999",
    "not a number": "NaN",
    "nested": "[" * 5000 + '"]}"' + "]" * 5000,
    "objects": '{"a":' * 5000 + "{}" + "}" * 5000,
    "tab": '"\t"',
    "surrogate": r'"\ud800"',
    "bytes": b'"\xff"',
}


@pytest.mark.parametrize("name", ODD_FIELDS)
def test_unusual_values_of_other_json_fields_are_ignored(tmp_path, name):
    odd = ODD_FIELDS[name] if isinstance(ODD_FIELDS[name], bytes) else ODD_FIELDS[name].encode()
    for number, line in enumerate((b'{"odd": %s, "text": "a \\" b"}', b'{"text": "a \\" b", "odd": %s}')):
        (tmp_path / f"{number}.jsonl").write_bytes(line % odd + b"\n")
    assert read(tmp_path / "*.jsonl") == ['a " b'] * 2
    for text in (ODD_FIELDS["surrogate"].encode(), ODD_FIELDS["bytes"]):
        with pytest.raises(readers.Fault, match="invalid_utf8"):
            readers.parse(b'{"text": %s}' % text, "jsonl", "text")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl"])
def test_objects_of_json_arrays_are_documents(tmp_path, monkeypatch, indent, suffix):
    monkeypatch.setattr(readers.streams, "BLOCK_BYTES", 7)
    texts = ['a "}{" \\', "b\n[1]", "🙂 \\\\", "{"]
    values = [{"id": [i, {"x": "]}"}], "text": text} for i, text in enumerate(texts)]
    content = json.dumps(values, indent=indent).encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert read(path) == texts
    for end in (len(content) - 1, len(content) // 2):
        path.write_bytes(gzip.compress(content[:end]) if suffix.endswith("gz") else content[:end])
        with pytest.raises(UserError, match="ends inside a JSON value"):
            read(path)


def test_json_objects_can_span_lines(tmp_path):
    values = [{"text": "a"}, {"text": "b", "more": {"c": [1]}}]
    (tmp_path / "a.json").write_text("\n".join(json.dumps(value, indent=2) for value in values))
    assert read(tmp_path / "a.json") == ["a", "b"]
    (tmp_path / "a.json").write_text(json.dumps(values[0]))
    assert read(tmp_path / "a.json") == ["a"]
    (tmp_path / "a.json").write_text('[{"text": "a"}, "stray", 7]')
    assert read(tmp_path / "a.json") == ["a", "<bad_json>"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a" * 100}, {"text": "b"}]))
    assert read(tmp_path / "a.json", max_bytes=50) == ["<too_long>", "b"]


BROKEN = '{"text": "a 5" pipe"}'


@pytest.mark.parametrize("end", ["\n", ",\n", ", "])
def test_objects_that_an_unpaired_quote_joins_are_counted(tmp_path, end):
    """Between two unpaired quotation marks, the starts of objects look like text."""
    lines = [json.dumps({"text": f"text {i} {{}}", "more": {"n": [i, {}]}}) for i in range(300)]
    lines[9] = lines[209] = BROKEN
    (tmp_path / "a.json").write_text(f"[{end.join(lines)}]")
    found = read(tmp_path / "a.json")
    assert found == [
        *(f"text {i} {{}}" for i in range(9)),
        "<bad_json> x201",
        *(f"text {i} {{}}" for i in range(210, 300)),
    ]
    assert read(tmp_path / "a.json", max_bytes=1000)[9] == "<too_long> x201"
    recipe = Recipe(str(tmp_path / "a.json"), vocab_size=384)
    with pytest.raises(UserError, match="201 of 300 documents are unusable .201 bad_json"):
        build(recipe, str(tmp_path / "out"), 1, quiet=True)


def test_text_that_looks_like_objects_is_one_document(tmp_path):
    code = "x = [{1},\n{2}, {3}]"
    (tmp_path / "a.json").write_text(json.dumps([{"text": code}, {"text": code * 100}, {"text": "b"}]))
    assert read(tmp_path / "a.json") == [code, code * 100, "b"]


def test_a_malformed_line_of_json_lines_is_one_document(tmp_path):
    for first in (BROKEN, '{"text": "a"', '{"text": "a"} x', "x"):
        (tmp_path / "a.jsonl").write_text(first + '\n{"text": "b"}\n{"text": "c"}\n')
        assert read(tmp_path / "a.jsonl") == ["<bad_json>", "b", "c"], first


@pytest.mark.parametrize("separator", ["", " ", ", ", "\r"])
def test_several_objects_in_one_line_are_documents(tmp_path, separator):
    texts = [f"{{text}} {i}" for i in range(100)]
    (tmp_path / "a.jsonl").write_text(separator.join(json.dumps({"text": text}) for text in texts))
    assert read(tmp_path / "a.jsonl") == texts


def test_objects_over_lines_may_start_with_a_key(tmp_path):
    values = [{"id": i, "text": f"t{i}", "meta": {"a": [1, {}]}} for i in range(3)]
    texts = "\n".join(json.dumps(value, indent=1).replace('{\n "id"', '{ "id"', 1) for value in values)
    assert texts.startswith('{ "id": 0,\n')
    (tmp_path / "a.json").write_text(texts)
    assert read(tmp_path / "a.json") == ["t0", "t1", "t2"]


@pytest.mark.parametrize("content", ['["one", "two"]', "[1, 2]", '[ ["text", "one"]]'])
def test_arrays_of_other_values_are_an_error(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="a.json is a JSON array of other values than objects; write one"):
        read(tmp_path / "a.json")


def test_objects_may_follow_an_array(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b"}]\n{"text": "c"}\n[{"text": "d"}]\n')
    assert read(tmp_path / "a.json") == ["a", "b", "c", "d"]
    (tmp_path / "a.json").write_text('[{"text": "a"}]\n[{"text": "d"}\n')
    with pytest.raises(UserError, match="ends inside a JSON value"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[]")
    assert read(tmp_path / "a.json") == []


def test_blank_lines_between_json_lines_are_not_documents(tmp_path):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(80)]
    (tmp_path / "a.jsonl").write_text("\n\n \t\r\n".join(lines) + "\n\n")
    assert read(tmp_path / "a.jsonl") == [f"text {i}" for i in range(80)]
    recipe = Recipe(str(tmp_path / "a.jsonl"), vocab_size=384, valid_fraction=0.2)
    manifest = build(recipe, str(tmp_path / "out"), 1, quiet=True)
    assert manifest["documents_read"] == 80


def test_a_wrong_text_key_raises_with_the_existing_keys():
    with pytest.raises(readers.Fault, match=r"--text_key=text does not exist; the keys are 'content', 'id'"):
        readers.parse(b'{"content": "x", "id": 7}', "jsonl", "text")
    with pytest.raises(readers.Fault, match=r"--text_key=id is not a string; the keys are 'content', 'id'"):
        readers.parse(b'{"content": "x", "id": 7}', "jsonl", "id")


# --- text ---


def test_a_single_text_file_is_split_at_blank_lines(tmp_path):
    paragraphs = [f"  Paragraph {i}.\r\nIts second line." + " More." * (i % 50) for i in range(300)]
    path = tmp_path / "input.txt"
    path.write_bytes("\r\n\r\n".join(paragraphs).encode())
    found = read(path, divide=True)
    assert "\r\n\r\n".join(found) == "\r\n\r\n".join(paragraphs)
    assert all(len(text) <= 2048 for text in found)
    assert all(len(a) + len(b.split("\r\n\r\n")[0]) > 2000 for a, b in zip(found, found[1:], strict=False))
    assert read(path) == ["\r\n\r\n".join(paragraphs)]
    build(Recipe(input=str(path), vocab_size=384, valid_fraction=0.1), str(tmp_path / "c"), 1, quiet=True)
    documents = Corpus(str(tmp_path / "c")).manifest["splits"]
    assert documents["train"]["documents"] + documents["valid"]["documents"] == len(found)


@pytest.mark.parametrize("suffix", ["train", "dev", "test.gz"])
def test_text_without_blank_lines_is_split_at_line_ends(tmp_path, suffix):
    lines = [f"*MOT: utterance {i} ." for i in range(2000)]
    content = "\n".join(lines).encode()
    for name in ("childes", "switchboard"):
        (tmp_path / f"{name}.{suffix}").write_bytes(
            gzip.compress(content) if suffix.endswith("gz") else content
        )
    found = read(tmp_path / f"*.{suffix}")
    assert "\n".join(found) == "\n".join(lines * 2)
    assert all(2000 < len(text) <= 4096 for text in found[: len(found) // 2 - 1])


def test_each_of_several_text_files_is_a_document(tmp_path):
    for name in "abc":
        text = "\n\n".join(f"{name} {random.Random(i).random()}" for i in range(1000))
        (tmp_path / f"{name}.txt").write_text(text)
    recipe = Recipe(input=f"{tmp_path}/[ab].txt", valid_input=f"{tmp_path}/c.txt", vocab_size=384)
    splits = build(recipe, str(tmp_path / "corpus"), workers=1, quiet=True)["splits"]
    assert splits["train"]["documents"] == 2
    assert splits["valid"]["documents"] > 5  # a single file is split
