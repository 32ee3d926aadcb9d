"""Domains of held-out documents: fields, columns, file names, storage and errors."""

import json
import shutil

import pytest

from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.data.domains import file_domain
from dualsm.process.errors import UserError

SOURCES = ("books", "web", "speeches")


@pytest.fixture(scope="module")
def records(documents):
    """Returns 150 documents with the key `source`, which every tenth lacks."""
    return [
        {"text": text} if i % 10 == 9 else {"text": text, "source": SOURCES[i % 3]}
        for i, text in enumerate(dict.fromkeys(documents[:150]))
    ]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def make(tmp_path, corpus_path, name="corpus", workers=1, **recipe):
    recipe = {"tokenizer": str(corpus_path / "tokenizer.model"), "valid_fraction": 0.3} | recipe
    return build(Recipe(**recipe), str(tmp_path / name), workers, quiet=True)


def domains_by_text(path):
    corpus = Corpus(str(path))
    documents, tokenizer = corpus.documents("valid"), corpus.tokenizer()
    texts = map(tokenizer.decode, documents.read(range(len(documents))))
    return {text: documents.domains[i] for text, i in zip(texts, documents.domain_N, strict=True)}


def test_each_held_out_document_has_the_domain_of_its_record(tmp_path, corpus_path, records):
    path = write(tmp_path / "a.jsonl", records)
    manifest = make(tmp_path, corpus_path, input=path, domain_key="source")
    found = domains_by_text(tmp_path / "corpus")
    expected = {record["text"]: record.get("source", "(none)") for record in records}
    assert found == {text: expected[text] for text in found}
    counts = manifest["splits"]["valid"]["domains"]
    assert counts == {name: list(found.values()).count(name) for name in sorted(set(found.values()))}
    assert set(counts) == {"(none)", *SOURCES}
    assert Corpus(str(tmp_path / "corpus")).documents("train").domain_N is None


def test_without_a_key_nothing_is_recorded(tmp_path, corpus_path, records):
    path = write(tmp_path / "a.jsonl", records)
    plain = make(tmp_path, corpus_path, "plain", input=path)
    labeled = make(tmp_path, corpus_path, "labeled", input=path, domain_key="source")
    documents = Corpus(str(tmp_path / "plain")).documents("valid")
    assert documents.domains == [] and documents.domain_N is None
    assert plain["identity"] == labeled["identity"]
    extra = labeled["splits"]["valid"].keys() - plain["splits"]["valid"].keys()
    assert extra == {"domains", "document_domains", "document_domains_sha256"}
    with pytest.raises(UserError, match="was not created by this command"):
        make(tmp_path, corpus_path, "plain", input=path, domain_key="source")


def test_domains_of_duplicates_depend_on_neither_workers_nor_files(tmp_path, corpus_path, records):
    texts = [record["text"] for record in records]
    a = write(tmp_path / "a.jsonl", [{"text": text, "source": "b"} for text in texts])
    b = write(tmp_path / "b.jsonl", [{"text": text, "source": "a"} for text in texts[:70]])
    make(tmp_path, corpus_path, "one", input=f"{a},{b}", domain_key="source")
    make(tmp_path, corpus_path, "two", workers=3, input=f"{b},{a}", domain_key="source")
    found = domains_by_text(tmp_path / "one")
    assert found == domains_by_text(tmp_path / "two")
    assert set(found.values()) == {"a", "b"}
    assert all((text in texts[:70]) == (name == "a") for text, name in found.items())


def test_nested_fields_numbers_and_spaces(tmp_path, corpus_path, documents):
    values = [" two  words\n", 7, True, None, "", "\ud83d"]
    records = [{"text": text, "meta": {"kind": v}} for text, v in zip(documents[:6], values, strict=True)]
    path = write(tmp_path / "a.jsonl", records)
    valid = write(tmp_path / "b.jsonl", [{"text": "to train on"}])
    make(tmp_path, corpus_path, input=valid, valid_input=path, domain_key="meta.kind")
    found = domains_by_text(tmp_path / "corpus")
    names = ["two words", "7", "true", "(none)", "(none)", "?"]
    assert [found[record["text"]] for record in records] == names


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "arrow"])
def test_domains_of_columns(tmp_path, corpus_path, suffix):
    texts = [f"held-out text {i}" for i in range(40)]
    names, path = [SOURCES[i % 3] for i in range(40)], tmp_path / f"a.{suffix}"
    if suffix in ("parquet", "arrow"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        content = pyarrow.table({"text": texts, "meta": [{"source": name} for name in names]})
        if suffix == "parquet":
            parquet.write_table(content, path)
        else:
            with pyarrow.ipc.new_stream(str(path), content.schema) as writer:
                writer.write_table(content)
        key = "meta.source"
    else:
        between = {"csv": ",", "tsv": "\t"}[suffix]
        rows = [f"{name}{between}{text}" for name, text in zip(names, texts, strict=True)]
        path.write_text("\n".join([f"source{between}text", *rows]))
        key = "source"
    train = write(tmp_path / "train.jsonl", [{"text": "to train on"}])
    make(tmp_path, corpus_path, input=train, valid_input=str(path), domain_key=key)
    assert domains_by_text(tmp_path / "corpus") == dict(zip(texts, names, strict=True))
    with pytest.raises(UserError, match=r"no column 'kind'; set --domain_key to one of"):
        make(tmp_path, corpus_path, "other", input=str(path), domain_key="kind")


@pytest.mark.parametrize("form", ["string", "large_string", "binary", "dictionary", "csv"])
def test_invalid_utf8_in_domains_is_replaced(tmp_path, corpus_path, form):
    """Columns of Parquet give the same domains as CSV."""
    texts, raw = [f"held-out text {i}" for i in range(3)], [b"caf\xe9", "café".encode(), None]
    if form == "csv":
        path = tmp_path / "a.csv"
        rows = [(name or b"") + b"," + text.encode() for name, text in zip(raw, texts, strict=True)]
        path.write_bytes(b"\n".join([b"source,text", *rows]))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        path, names = tmp_path / "a.parquet", pyarrow.array(raw, pyarrow.binary())
        if form == "large_string":
            names = names.cast(pyarrow.large_binary()).view(pyarrow.large_string())
        elif form != "binary":
            names = names.view(pyarrow.string())
        names = names.dictionary_encode() if form == "dictionary" else names
        parquet.write_table(pyarrow.table({"text": texts, "source": names}), path)
    train = write(tmp_path / "train.jsonl", [{"text": "to train on"}])
    make(tmp_path, corpus_path, input=train, valid_input=str(path), domain_key="source")
    expected = dict(zip(texts, ["caf?", "café", "(none)"], strict=True))
    assert domains_by_text(tmp_path / "corpus") == expected


def test_file_names_as_domains(tmp_path, corpus_path, documents):
    for i, name in enumerate(("childes", "bnc_spoken")):
        (tmp_path / f"{name}.dev").write_text("\n\n".join(documents[50 * i : 50 * i + 50]))
    train = write(tmp_path / "train.jsonl", [{"text": "to train on"}])
    make(tmp_path, corpus_path, input=train, valid_input=str(tmp_path / "*.dev"), domain_key="@file")
    assert Corpus(str(tmp_path / "corpus")).documents("valid").domains == ["bnc_spoken", "childes"]


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/books.jsonl.gz", "books"), ("v1.2.parquet", "v1.2"), ("notes.md", "notes.md"), ("a.b.TXT", "a.b")],
)
def test_domain_of_a_file(path, name):
    assert file_domain(path) == name


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"source": {"name": "a"}}, "line 1: --domain_key=source is neither a string nor a number"),
        ({"source": "x" * 101}, "line 1: --domain_key=source has 101 characters, more than 100"),
        ({"sauce": "a"}, "--domain_key=source: no held-out document has this field; check its name"),
    ],
)
def test_unusable_fields_are_rejected(tmp_path, corpus_path, record, message):
    valid = write(tmp_path / "valid.jsonl", [{"text": "held out"} | record])
    train = write(tmp_path / "train.jsonl", [{"text": "to train on"}])
    with pytest.raises(UserError, match=message):
        make(tmp_path, corpus_path, input=train, valid_input=valid, domain_key="source")
    assert not (tmp_path / "corpus").exists()


def test_too_many_domains_are_rejected(tmp_path, corpus_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"text {i}", "url": f"page {i}"} for i in range(600)])
    with pytest.raises(UserError, match=r"--domain_key=url has more than 256 values, such as 'page \d+'"):
        make(tmp_path, corpus_path, input=path, valid_fraction=0.6, domain_key="url")


def test_text_has_no_fields(tmp_path, corpus_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    with pytest.raises(UserError, match="files of --input are text or token ids, which have no fields"):
        make(tmp_path, corpus_path, input=str(tmp_path / "a.txt"), domain_key="source")


@pytest.mark.parametrize("damage", ["content", "counts", "missing"])
def test_damage_is_found(tmp_path, corpus_path, records, damage):
    path = write(tmp_path / "a.jsonl", records)
    make(tmp_path, corpus_path, "good", input=path, domain_key="source")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    file, manifest_path = tmp_path / "bad" / "valid-domains.uint16", tmp_path / "bad" / "manifest.json"
    if damage == "content":
        file.write_bytes(file.read_bytes()[:-2] + b"\xff\xff")
    elif damage == "missing":
        file.unlink()
    else:
        manifest = json.loads(manifest_path.read_text())
        manifest["splits"]["valid"]["domains"]["web"] += 1
        manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"valid-domains.uint16"):
        Corpus(str(tmp_path / "bad")).documents("valid")
