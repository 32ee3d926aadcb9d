"""Building a corpus: content, statistics, errors and interruptions."""

import gzip
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time

import numpy as np
import pytest

from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.process.errors import UserError
from tests.exchange.conftest import ADDING, make_tokenizer_json, with_normalizers


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def make(tmp_path, name="corpus", workers=1, **recipe):
    recipe = {"vocab_size": 384, "valid_fraction": 0.2} | recipe
    return build(Recipe(**recipe), str(tmp_path / name), workers, quiet=True)


def texts_of(path, split):
    corpus = Corpus(str(path))
    tokenizer, documents = corpus.tokenizer(), corpus.documents(split)
    return [tokenizer.decode(tokens) for tokens in documents.read(range(len(documents)))]


@pytest.fixture
def texts(documents):
    return documents[:150]


def test_documents_round_trip(tmp_path, texts):
    difficult = ["tab\tand  spaces  ", "naïve 🙂 \u2028 line", "\n\n leading", "nul \0 inside", "▁ piece"]
    expected = list(dict.fromkeys(texts + difficult))
    manifest = make(tmp_path, input=write_lines(tmp_path / "a.jsonl", expected))
    found = texts_of(tmp_path / "corpus", "train") + texts_of(tmp_path / "corpus", "valid")
    assert sorted(found) == sorted(expected)
    splits = manifest["splits"]
    assert sum(split["documents"] for split in splits.values()) == len(expected)
    assert sum(split["bytes"] for split in splits.values()) == sum(len(t.encode()) for t in expected)


def make_with_tokenizer(tmp_path, texts, content: str, **options) -> dict:
    """Builds a corpus with the given `tokenizer.json`; returns its manifest."""
    (tmp_path / "tokenizer.json").write_text(content)
    recipe = {"vocab_size": 0, "tokenizer": str(tmp_path / "tokenizer.json")} | options
    return make(tmp_path, input=write_lines(tmp_path / "a.jsonl", texts), **recipe)


def test_the_sizes_of_held_out_documents_are_written(tmp_path, texts):
    texts += ["naïve 🙂 \u2028 line", "▁ piece", "中" * 5000]
    make(tmp_path, input=write_lines(tmp_path / "a.jsonl", texts), valid_fraction=0.5)
    bytes_N = Corpus(str(tmp_path / "corpus")).documents("valid").bytes_N
    assert bytes_N.tolist() == [len(text.encode()) for text in texts_of(tmp_path / "corpus", "valid")]


def test_every_document_of_a_small_corpus_is_verified(tmp_path, texts):
    manifest = make(tmp_path, input=write_lines(tmp_path / "a.jsonl", texts))
    number = sum(split["documents"] for split in manifest["splits"].values())
    size = sum(split["bytes"] for split in manifest["splits"].values())
    assert manifest["round_trip"] == {
        "lossless": True,
        "documents": number,
        "identical": number,
        "bytes": size,
        "surviving_bytes": size,
    }


def test_a_tokenizer_that_is_wrongly_declared_lossless_raises(tmp_path, texts):
    content = json.loads(make_tokenizer_json(texts))
    rule = {"type": "Replace", "pattern": {"String": "qqq"}, "content": "q"}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], rule]}
    make_with_tokenizer(tmp_path, texts, json.dumps(content))
    broken = (
        r"-of-00008.array_record: document .* does not decode to its text.*b'qq\\n' became b'\\n' at byte 3"
    )
    with pytest.raises(UserError, match=broken):
        make_with_tokenizer(tmp_path, [*texts, "a qqq\n"], json.dumps(content), name="other")
    assert not list(tmp_path.glob("*other*"))


@pytest.mark.parametrize(
    ("normalizers", "identical", "surviving"),
    [
        ([{"type": "Lowercase"}], ["all small", "äö"], len("all smallapitalsäö".encode())),
        ([{"type": "Replace", "pattern": {"String": "ä"}, "content": ""}], ["all small", "Capitals"], 19),
        (ADDING, [], len("all smallCapitalsäö".encode())),
    ],
)
def test_the_manifest_counts_the_text_that_survives(tmp_path, documents, normalizers, identical, surviving):
    texts = ["all small", "Capitals", "äö"]
    content = with_normalizers(make_tokenizer_json(documents[:50]), *normalizers)
    manifest = make_with_tokenizer(tmp_path, texts, content, valid_fraction=0.7)
    assert manifest["round_trip"] == {
        "lossless": False,
        "documents": 3,
        "identical": len(identical),
        "bytes": 21,
        "surviving_bytes": surviving,
    }


def test_a_tokenizer_that_changes_text_warns(tmp_path, documents, capsys):
    content = with_normalizers(make_tokenizer_json(documents[:50]), {"type": "Lowercase"})
    (tmp_path / "tokenizer.json").write_text(content)
    path = write_lines(tmp_path / "a.jsonl", [f"Text {i}" for i in range(100)])
    recipe = Recipe(input=path, tokenizer=str(tmp_path / "tokenizer.json"), valid_fraction=0.2)
    build(recipe, str(tmp_path / "corpus"), workers=1)
    assert "in a sample, 0 of 100 documents decode to the same text and 85.51% of" in capsys.readouterr().err


def test_documents_start_with_bos_and_end_with_eos(corpus):
    documents = corpus.documents("train")
    special = corpus.tokenizer().special
    read = documents.read(range(len(documents)))
    assert [len(tokens) for tokens in read] == documents.lengths_N.tolist()
    for tokens in read:
        assert (tokens[0], tokens[-1]) == (special.bos, special.eos)
        assert (tokens[1:-1] >= 16).all()


def test_the_corpus_depends_on_neither_the_workers_nor_the_order_of_files(tmp_path, texts):
    a = write_lines(tmp_path / "a.jsonl", texts[:80])
    b = write_lines(tmp_path / "b.jsonl", texts[80:])
    one = make(tmp_path, "one", workers=1, input=f"{a},{b}")
    two = make(tmp_path, "two", workers=3, input=f"{b},{a}")
    assert one["identity"] == two["identity"]
    assert {k: v for k, v in one.items() if k != "arguments"} == {
        k: v for k, v in two.items() if k != "arguments"
    }


def test_documents_are_shuffled_and_held_out_by_content(tmp_path, texts):
    make(tmp_path, "all", input=write_lines(tmp_path / "a.jsonl", texts))
    make(tmp_path, "half", input=write_lines(tmp_path / "b.jsonl", texts[:75]))
    valid = texts_of(tmp_path / "all", "valid")
    assert 0 < len(valid) < 60
    # The held-out documents and their order do not depend on the other documents.
    assert texts_of(tmp_path / "half", "valid") == [text for text in valid if text in texts[:75]]
    train = texts_of(tmp_path / "all", "train")
    positions = [texts.index(text) for text in train]
    assert positions != sorted(positions)
    assert abs(np.corrcoef(positions, np.arange(len(positions)))[0, 1]) < 0.3


def test_duplicates_are_dropped_and_counted(tmp_path, texts):
    unique = list(dict.fromkeys(texts))
    manifest = make(
        tmp_path, workers=2, input=write_lines(tmp_path / "a.jsonl", unique + unique[:30] + unique[:10])
    )
    assert manifest["documents_duplicate"] == 40
    assert manifest["documents_read"] == len(unique) + 40
    found = texts_of(tmp_path / "corpus", "train") + texts_of(tmp_path / "corpus", "valid")
    assert sorted(found) == sorted(unique)


def test_documents_of_valid_input_are_not_trained_on(tmp_path, texts):
    valid = write_lines(tmp_path / "valid.jsonl", texts[:20])
    make(tmp_path, input=write_lines(tmp_path / "a.jsonl", texts), valid_input=valid)
    assert sorted(texts_of(tmp_path / "corpus", "valid")) == sorted(set(texts[:20]))
    assert not set(texts_of(tmp_path / "corpus", "train")) & set(texts[:20])


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "parquet"])
def test_input_formats(tmp_path, texts, form):
    texts = list(dict.fromkeys(texts))
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts).encode()
    pattern = tmp_path / f"a.{form}"
    if form == "jsonl":
        pattern.write_bytes(lines)
    elif form == "jsonl.gz":
        pattern.write_bytes(gzip.compress(lines))
    elif form == "jsonl.zst":
        import zstandard

        half = len(lines) // 2  # two frames
        compress = zstandard.ZstdCompressor().compress
        pattern.write_bytes(compress(lines[:half]) + compress(lines[half:]))
    elif form == "txt":
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.txt").write_text(text, newline="")
        pattern = tmp_path / "*.txt"
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"body": texts, "other": range(len(texts))}), pattern)
    make(tmp_path, input=str(pattern), text_key="text" if form == "txt" else "body")
    found = texts_of(tmp_path / "corpus", "train") + texts_of(tmp_path / "corpus", "valid")
    assert sorted(found) == sorted(texts)


FAULTY = {
    "bad_json": b'{"text": "open\n',
    "no_text": b'{"body": "x"}\n',
    "invalid_utf8": b'{"text": "\xff\xfe"}\n',
    "empty_text": b'{"text": "  "}\n',
    "too_long": b'{"text": "' + b"x" * 70_000 + b'"}\n',
}


def test_unusable_documents_are_counted_by_kind(tmp_path, texts):
    path = tmp_path / "a.jsonl"
    write_lines(path, texts)
    path.write_bytes(path.read_bytes() + b"".join(FAULTY.values()) + FAULTY["no_text"] + b'["no object"]\n')
    manifest = make(tmp_path, input=str(path), max_bad_fraction=0.1, max_document_bytes=60_000)
    assert manifest["documents_faulty"] == dict.fromkeys(FAULTY, 1) | {
        "no_text": 3,
        "unknown_id": 0,
        "bad_csv": 0,
    }


@pytest.mark.parametrize("kind", FAULTY)
def test_too_many_unusable_documents_raise_with_file_and_line(tmp_path, texts, kind):
    path = tmp_path / "a.jsonl"
    write_lines(path, texts[:50])
    path.write_bytes(path.read_bytes() + FAULTY[kind] * 2)
    with pytest.raises(UserError, match=rf"2 of 52 documents.*2 {kind}.*a\.jsonl, line 52"):
        make(tmp_path, input=str(path), max_bad_fraction=0.03, max_document_bytes=60_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_wrong_text_key_raises_with_the_existing_keys(tmp_path):
    lines = [b'{"content": "text %d", "id": %d}\n' % (i, i) for i in range(300)]
    (tmp_path / "a.jsonl").write_bytes(b"".join([*lines, b"not JSON\n"]))
    expected = (
        "301 of 301 .*300 no_text.*line 300 .*--text_key=text does not exist; the keys are 'content', 'id'"
    )
    with pytest.raises(UserError, match=expected):
        make(tmp_path, input=str(tmp_path / "a.jsonl"))


def test_text_in_another_encoding_raises_with_a_guess(tmp_path):
    (tmp_path / "a.txt").write_bytes("Déjà vu, naïve café.\n\n".encode("latin-1") * 300)
    with pytest.raises(UserError, match="invalid_utf8: perhaps Latin-1"):
        make(tmp_path, input=str(tmp_path / "a.txt"))


def test_unusable_input_raises_before_all_of_it_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"not json, and long enough to make blocks\n" * 500_000)
    with pytest.raises(UserError) as error:
        make(tmp_path, input=str(path))
    assert int(str(error.value).split(" of ")[1].split()[0]) < 100_000


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"input": "nowhere/*.jsonl"}, "no files match"),
        ({"input": __file__}, "has none of the suffixes"),
        ({"input": "python-stdlib", "valid_input": "nowhere"}, "--valid_input: no files match 'nowhere'"),
        ({"input": "python-stdlib", "vocab_size": 0}, "--vocab_size"),
        ({"input": "python-stdlib", "vocab_size": 512, "tokenizer": "x.model"}, "--vocab_size"),
        ({"input": "python-stdlib", "valid_fraction": 1.5}, "--valid_fraction"),
        ({"input": "python-stdlib", "valid_fraction": 0.0}, "holds out no documents.*--valid_input"),
        ({"input": "python-stdlib", "tokenizer": "nowhere.model", "vocab_size": 0}, "nowhere.model"),
    ],
)
def test_invalid_recipes_raise(tmp_path, recipe, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path, **recipe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocab_size", [100, 256, 1000])
def test_invalid_vocab_sizes_raise_before_reading(tmp_path, vocab_size):
    (tmp_path / "a.jsonl").write_text("not json\n" * 1000)
    with pytest.raises(UserError, match="must be a multiple of 128 and at least 384"):
        make(tmp_path, input=str(tmp_path / "a.jsonl"), vocab_size=vocab_size)


def test_a_vocab_size_too_large_for_the_text_raises(tmp_path, texts):
    with pytest.raises(UserError, match="cannot train"):
        make(tmp_path, input=write_lines(tmp_path / "a.jsonl", texts), vocab_size=1 << 20)


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        (["one"], None, "a single usable document, so.*split it.*--valid_input"),
        (["one", "two", "six"], None, "for the valid split at --valid_fraction=1e-09; raise"),
        (["one", "two"], [], "--valid_input=.*valid.jsonl contains no documents"),
        ([], ["one", "two"], "--input=.*train.jsonl contains no documents"),
        (["one", "two"], ["two", "one"], "--valid_input contains all documents of --input="),
    ],
)
def test_an_empty_split_raises_with_the_remedy(tmp_path, train, valid, message):
    recipe = {"input": write_lines(tmp_path / "train.jsonl", train), "valid_fraction": 1e-9}
    if valid is not None:
        recipe["valid_input"] = write_lines(tmp_path / "valid.jsonl", valid)
    with pytest.raises(UserError, match=message):
        make(tmp_path, **recipe)
    assert not list(tmp_path.glob("*corpus*"))


def test_an_existing_output_is_kept_if_the_recipe_is_the_same(tmp_path, texts):
    path = write_lines(tmp_path / "a.jsonl", texts)
    first = make(tmp_path, input=path)
    changed = os.stat(tmp_path / "corpus" / "manifest.json").st_mtime_ns
    assert make(tmp_path, input=path) == json.loads(json.dumps(first))
    assert os.stat(tmp_path / "corpus" / "manifest.json").st_mtime_ns == changed
    with pytest.raises(UserError, match="was not created by this command"):
        make(tmp_path, input=path, vocab_size=512)


def test_an_existing_output_raises_if_the_tokenizer_file_has_changed(tmp_path, texts):
    make(tmp_path, "first", input=write_lines(tmp_path / "a.jsonl", texts))
    make(tmp_path, "second", input=write_lines(tmp_path / "b.jsonl", texts[:90]))
    path = tmp_path / "tokenizer.model"
    shutil.copy(tmp_path / "first" / "tokenizer.model", path)
    recipe = {"input": str(tmp_path / "a.jsonl"), "tokenizer": str(path), "vocab_size": 0}
    manifest = make(tmp_path, **recipe)
    assert make(tmp_path, **recipe) == manifest
    shutil.copy(tmp_path / "second" / "tokenizer.model", path)
    with pytest.raises(UserError, match="was created before --tokenizer=.*model changed"):
        make(tmp_path, **recipe)
    path.unlink()  # the corpus contains its tokenizer
    assert make(tmp_path, **recipe) == manifest


def test_a_corpus_is_written_to_an_empty_folder_behind_a_link(tmp_path, texts):
    (tmp_path / "empty").mkdir()
    os.symlink("empty", tmp_path / "link")
    manifest = make(tmp_path, "link", input=write_lines(tmp_path / "a.jsonl", texts))
    assert Corpus(str(tmp_path / "empty")).identity == manifest["identity"]
    assert make(tmp_path, "link", input=str(tmp_path / "a.jsonl")) == json.loads(json.dumps(manifest))


def test_an_existing_output_raises_if_the_input_files_have_changed(tmp_path, texts):
    """Files are compared by name and size, not by folder."""
    folders = [tmp_path / "text", tmp_path / "moved"]
    folders[0].mkdir()
    write_lines(folders[0] / "a.jsonl", texts[:80])
    first = make(tmp_path, input=f"{folders[0]}/*.jsonl")
    folders[0].rename(folders[1])
    pattern = f"{folders[1]}/*.jsonl"
    assert make(tmp_path, input=pattern) == first
    with pytest.raises(UserError, match="created from 1 input files that differ .* the 2 files given now"):
        make(tmp_path, input=pattern, valid_input=write_lines(tmp_path / "v.jsonl", texts[:2]))
    write_lines(folders[1] / "b.jsonl", texts[80:])
    with pytest.raises(UserError, match="created from 1 input files that differ .* the 2 files given now"):
        make(tmp_path, input=pattern)
    (folders[1] / "a.jsonl").unlink()
    with pytest.raises(UserError, match="created from 1 input files that differ .* the 1 files given now"):
        make(tmp_path, input=pattern)


def test_a_corpus_of_an_earlier_version_is_recognized_by_its_arguments(tmp_path, texts):
    path = write_lines(tmp_path / "a.jsonl", texts)
    manifest = make(tmp_path, input=path)
    del manifest["inputs_sha256"]
    manifest["arguments"]["vocabulary"] = manifest["arguments"].pop("vocab_size")
    del manifest["arguments"]["format"], manifest["arguments"]["split"]
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    assert make(tmp_path, input=path) == manifest
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="was not created by this command"):
        make(tmp_path, input=str(tmp_path / "b.jsonl"))


def delete(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size - 4)


def change(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (delete, "train-*.array_record"), (truncate, "valid-*.array_record"), (delete, "tokenizer.model"),
        (change, "tokenizer.model"), (truncate, "train-lengths.int32"), (delete, "valid-lengths.int32"),
        (change, "train-lengths-index.int64"), (truncate, "valid-bytes.int64"), (delete, "valid-bytes.int64"),
    ],
)  # fmt: skip
def test_a_damaged_output_is_reported_and_can_be_prepared_again(tmp_path, texts, damage, pattern):
    path = write_lines(tmp_path / "a.jsonl", texts)
    make(tmp_path, input=path)
    file = sorted((tmp_path / "corpus").glob(pattern))[0]
    intact = file.read_bytes()
    damage(file)
    expected = f"--output={tmp_path}/corpus holds a damaged copy .*{file.name}.*; remove it and run the same"
    with pytest.raises(UserError, match=expected) as error:
        make(tmp_path, input=path)
    assert "again, or" not in str(error.value)  # only one piece of advice
    shutil.rmtree(tmp_path / "corpus")
    make(tmp_path, input=path)
    assert file.read_bytes() == intact


def test_an_output_with_more_shards_than_open_files_is_not_damaged(tmp_path, texts, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", texts)
    first = make(tmp_path, input=path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))
    assert make(tmp_path, input=path) == first


def test_an_output_in_another_format_is_not_kept(tmp_path, texts):
    path = write_lines(tmp_path / "a.jsonl", texts)
    manifest = make(tmp_path, input=path) | {"format": 0}
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was not created by this command; remove it or choose another"):
        make(tmp_path, input=path)


def test_an_existing_output_prints_a_message(corpus_path, corpus, capsys):
    build(Recipe(**corpus.manifest["arguments"]), str(corpus_path), workers=1)
    assert capsys.readouterr().out == f"{corpus_path} already contains this corpus; nothing to do\n"


def _prepare(path, output, pid):
    os.getpid = lambda: pid
    build(Recipe(input=path, vocab_size=384, valid_fraction=0.2), output, workers=1, quiet=True)


def test_an_interrupted_build_can_be_repeated(tmp_path, texts):
    """The next process may have the same process id, as in containers."""
    path = write_lines(tmp_path / "a.jsonl", texts)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_prepare, args=(path, str(tmp_path / "corpus"), os.getpid()))
    process.start()
    while not list(tmp_path.glob(".corpus.partial-*/buckets")):
        time.sleep(0.01)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "corpus").exists()
    make(tmp_path, input=path)  # deletes the remains
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "corpus"]


def test_damaged_shards_are_detected(tmp_path, texts):
    make(tmp_path, input=write_lines(tmp_path / "a.jsonl", texts))
    shard = sorted((tmp_path / "corpus").glob("train-*.array_record"))[0]
    content = shard.read_bytes()

    middle = content.index(b"\x28\xb5\x2f\xfd") + 20  # inside the first zstd frame
    shard.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    documents = Corpus(str(tmp_path / "corpus")).documents("train")
    with pytest.raises(UserError, match="damaged"):
        documents.read(range(len(documents)))

    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="truncated"):
        Corpus(str(tmp_path / "corpus"))
    shard.unlink()
    with pytest.raises(UserError, match="missing"):
        Corpus(str(tmp_path / "corpus"))


def test_a_manifest_cannot_refer_to_other_folders(tmp_path, texts):
    make(tmp_path, input=write_lines(tmp_path / "a.jsonl", texts))
    path = tmp_path / "corpus" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["lengths"] = "../a.jsonl"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="outside"):
        Corpus(str(tmp_path / "corpus"))
