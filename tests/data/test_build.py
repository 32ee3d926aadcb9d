"""From text to a corpus: what is kept, dropped, counted, refused; and that nothing half-done stays."""

import gzip
import json
import multiprocessing
import os
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


def test_every_document_comes_back_byte_for_byte(tmp_path, texts):
    difficult = ["tab\tand  spaces  ", "naïve 🙂 \u2028 line", "\n\n leading", "nul \0 inside", "▁ piece"]
    wanted = list(dict.fromkeys(texts + difficult))
    manifest = make(tmp_path, input=write_lines(tmp_path / "a.jsonl", wanted))
    found = texts_of(tmp_path / "corpus", "train") + texts_of(tmp_path / "corpus", "valid")
    assert sorted(found) == sorted(wanted)
    splits = manifest["splits"]
    assert sum(split["documents"] for split in splits.values()) == len(wanted)
    assert sum(split["bytes"] for split in splits.values()) == sum(len(t.encode()) for t in wanted)


def make_with(tmp_path, texts, content: str, **options) -> dict:
    """The manifest of a corpus whose tokenizer is the given `tokenizer.json`."""
    (tmp_path / "tokenizer.json").write_text(content)
    recipe = {"vocab_size": 0, "tokenizer": str(tmp_path / "tokenizer.json")} | options
    return make(tmp_path, input=write_lines(tmp_path / "a.jsonl", texts), **recipe)


def test_the_manifest_has_the_bytes_of_each_held_out_document(tmp_path, texts):
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


def test_a_tokenizer_that_breaks_its_promise_fails_and_leaves_nothing(tmp_path, texts):
    content = json.loads(make_tokenizer_json(texts))
    rule = {"type": "Replace", "pattern": {"String": "qqq"}, "content": "q"}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], rule]}
    make_with(tmp_path, texts, json.dumps(content))
    broken = (
        r"-of-00008.array_record: document .* does not decode to its text.* b'qq\\n' became b'\\n' at byte 3"
    )
    with pytest.raises(UserError, match=broken):
        make_with(tmp_path, [*texts, "a qqq\n"], json.dumps(content), name="other")
    assert not list(tmp_path.glob("*other*"))


@pytest.mark.parametrize(
    ("normalizers", "identical", "surviving"),
    [
        ([{"type": "Lowercase"}], ["all small", "äö"], len("all smallapitalsäö".encode())),
        ([{"type": "Replace", "pattern": {"String": "ä"}, "content": ""}], ["all small", "Capitals"], 19),
        (ADDING, [], len("all smallCapitalsäö".encode())),
    ],
)
def test_the_manifest_tells_how_much_text_survives(tmp_path, documents, normalizers, identical, surviving):
    texts = ["all small", "Capitals", "äö"]
    content = with_normalizers(make_tokenizer_json(documents[:50]), *normalizers)
    manifest = make_with(tmp_path, texts, content, valid_fraction=0.7)
    assert manifest["round_trip"] == {
        "lossless": False,
        "documents": 3,
        "identical": len(identical),
        "bytes": 21,
        "surviving_bytes": surviving,
    }


def test_lost_text_is_told_of(tmp_path, documents, capsys):
    content = with_normalizers(make_tokenizer_json(documents[:50]), {"type": "Lowercase"})
    (tmp_path / "tokenizer.json").write_text(content)
    path = write_lines(tmp_path / "a.jsonl", [f"Text {i}" for i in range(100)])
    recipe = Recipe(input=path, tokenizer=str(tmp_path / "tokenizer.json"), valid_fraction=0.2)
    build(recipe, str(tmp_path / "corpus"), workers=1)
    assert "0 of 100 documents of a sample come back as they were, and 85.51% of" in capsys.readouterr().err


def test_documents_start_and_end_with_their_marks(corpus):
    documents = corpus.documents("train")
    special = corpus.tokenizer().special
    read = documents.read(range(len(documents)))
    assert [len(tokens) for tokens in read] == documents.lengths_N.tolist()
    for tokens in read:
        assert (tokens[0], tokens[-1]) == (special.bos, special.eos)
        assert (tokens[1:-1] >= 16).all()


def test_the_result_depends_on_neither_workers_nor_the_order_of_files(tmp_path, texts):
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
    # Which documents are held out, and their order, does not change with what else is in the corpus.
    assert texts_of(tmp_path / "half", "valid") == [text for text in valid if text in texts[:75]]
    train = texts_of(tmp_path / "all", "train")
    places = [texts.index(text) for text in train]
    assert places != sorted(places)
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.3


def test_duplicates_are_dropped_and_counted(tmp_path, texts):
    unique = list(dict.fromkeys(texts))
    manifest = make(
        tmp_path, workers=2, input=write_lines(tmp_path / "a.jsonl", unique + unique[:30] + unique[:10])
    )
    assert manifest["documents_duplicate"] == 40
    assert manifest["documents_read"] == len(unique) + 40
    found = texts_of(tmp_path / "corpus", "train") + texts_of(tmp_path / "corpus", "valid")
    assert sorted(found) == sorted(unique)


def test_nothing_of_a_given_validation_set_is_trained_on(tmp_path, texts):
    valid = write_lines(tmp_path / "valid.jsonl", texts[:20])
    make(tmp_path, input=write_lines(tmp_path / "a.jsonl", texts), valid_input=valid)
    assert sorted(texts_of(tmp_path / "corpus", "valid")) == sorted(set(texts[:20]))
    assert not set(texts_of(tmp_path / "corpus", "train")) & set(texts[:20])


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "parquet"])
def test_formats(tmp_path, texts, form):
    texts = list(dict.fromkeys(texts))
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts).encode()
    pattern = tmp_path / f"a.{form}"
    if form == "jsonl":
        pattern.write_bytes(lines)
    elif form == "jsonl.gz":
        pattern.write_bytes(gzip.compress(lines))
    elif form == "jsonl.zst":
        import zstandard

        half = len(lines) // 2  # several frames, as pzstd writes them
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
    make(tmp_path, input=str(pattern), text_key="body")
    found = texts_of(tmp_path / "corpus", "train") + texts_of(tmp_path / "corpus", "valid")
    assert sorted(found) == sorted(texts)


FAULTY = {
    "bad_json": b'{"text": "open\n',
    "no_text": b'{"body": "x"}\n',
    "invalid_utf8": b'{"text": "\xff\xfe"}\n',
    "empty_text": b'{"text": "  "}\n',
    "too_long": b'{"text": "' + b"x" * 70_000 + b'"}\n',
}


def test_faults_are_counted_by_kind(tmp_path, texts):
    path = tmp_path / "a.jsonl"
    write_lines(path, texts)
    path.write_bytes(path.read_bytes() + b"".join(FAULTY.values()) + FAULTY["no_text"] + b'["no object"]\n')
    manifest = make(tmp_path, input=str(path), max_bad_fraction=0.1, max_document_bytes=60_000)
    assert manifest["documents_faulty"] == dict.fromkeys(FAULTY, 1) | {"no_text": 3, "unknown_id": 0}


@pytest.mark.parametrize("kind", FAULTY)
def test_too_many_faults_stop_with_file_and_line(tmp_path, texts, kind):
    path = tmp_path / "a.jsonl"
    write_lines(path, texts[:50])
    path.write_bytes(path.read_bytes() + FAULTY[kind] * 2)
    with pytest.raises(UserError, match=rf"2 of 52 documents.*2 {kind}.*a\.jsonl, line 52"):
        make(tmp_path, input=str(path), max_bad_fraction=0.03, max_document_bytes=60_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_wrong_text_key_is_refused_with_the_keys_there_are(tmp_path):
    lines = [b'{"content": "text %d", "id": %d}\n' % (i, i) for i in range(300)]
    (tmp_path / "a.jsonl").write_bytes(b"".join([*lines, b"not JSON\n"]))
    expected = (
        "301 of 301 .*300 no_text.*line 300 .*--text_key=text is not there; the keys are 'content', 'id'"
    )
    with pytest.raises(UserError, match=expected):
        make(tmp_path, input=str(tmp_path / "a.jsonl"))


def test_text_in_another_encoding_is_refused_with_a_guess(tmp_path):
    (tmp_path / "a.txt").write_bytes("Déjà vu, naïve café.\n\n".encode("latin-1") * 300)
    with pytest.raises(UserError, match="invalid_utf8: perhaps Latin-1"):
        make(tmp_path, input=str(tmp_path / "a.txt"))


def test_a_hopeless_input_stops_long_before_its_end(tmp_path):
    """Half a million bad lines are not read to the end before saying so."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"not json, and long enough to make blocks\n" * 500_000)
    with pytest.raises(UserError) as error:
        make(tmp_path, input=str(path))
    assert int(str(error.value).split(" of ")[1].split()[0]) < 100_000


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"input": "nowhere/*.jsonl"}, "no file matches"),
        ({"input": __file__}, "is none of"),
        ({"input": "python-stdlib", "valid_input": "nowhere"}, "--valid_input: no file matches 'nowhere'"),
        ({"input": "python-stdlib", "vocab_size": 0}, "--vocab_size"),
        ({"input": "python-stdlib", "vocab_size": 512, "tokenizer": "x.model"}, "--vocab_size"),
        ({"input": "python-stdlib", "valid_fraction": 1.5}, "--valid_fraction"),
        ({"input": "python-stdlib", "valid_fraction": 0.0}, "holds nothing out.*--valid_input"),
        ({"input": "python-stdlib", "tokenizer": "nowhere.model", "vocab_size": 0}, "nowhere.model"),
    ],
)
def test_impossible_recipes_are_refused(tmp_path, recipe, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path, **recipe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocab_size", [100, 256, 1000])
def test_impossible_vocabularies_are_refused_before_anything_is_read(tmp_path, vocab_size):
    (tmp_path / "a.jsonl").write_text("not json\n" * 1000)
    with pytest.raises(UserError, match="must be a multiple of 128 and at least 384"):
        make(tmp_path, input=str(tmp_path / "a.jsonl"), vocab_size=vocab_size)


def test_a_vocabulary_too_large_for_the_text_is_refused(tmp_path, texts):
    with pytest.raises(UserError, match="cannot train"):
        make(tmp_path, input=write_lines(tmp_path / "a.jsonl", texts), vocab_size=1 << 20)


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        (["one"], None, "a single document, which.*split it.*--valid_input"),
        (["one", "two", "six"], None, "for the valid split; raise --valid_fraction"),
        (["one", "two"], [], "--valid_input=.*valid.jsonl holds no documents"),
        ([], ["one", "two"], "--input=.*train.jsonl holds no documents"),
        (["one", "two"], ["two", "one"], "--valid_input has all of --input="),
    ],
)
def test_a_split_without_documents_is_refused_with_what_can_help(tmp_path, train, valid, message):
    recipe = {"input": write_lines(tmp_path / "train.jsonl", train), "valid_fraction": 1e-9}
    if valid is not None:
        recipe["valid_input"] = write_lines(tmp_path / "valid.jsonl", valid)
    with pytest.raises(UserError, match=message):
        make(tmp_path, **recipe)
    assert not list(tmp_path.glob("*corpus*"))


def test_an_existing_output_is_kept_if_it_is_the_same_and_refused_if_not(tmp_path, texts):
    path = write_lines(tmp_path / "a.jsonl", texts)
    first = make(tmp_path, input=path)
    changed = os.stat(tmp_path / "corpus" / "manifest.json").st_mtime_ns
    assert make(tmp_path, input=path) == json.loads(json.dumps(first))
    assert os.stat(tmp_path / "corpus" / "manifest.json").st_mtime_ns == changed
    with pytest.raises(UserError, match="was not made by this command"):
        make(tmp_path, input=path, vocab_size=512)


def test_an_existing_output_is_refused_when_its_files_are_others_now(tmp_path, texts):
    """Others by name or size; where they lie does not matter."""
    folders = [tmp_path / "text", tmp_path / "moved"]
    folders[0].mkdir()
    write_lines(folders[0] / "a.jsonl", texts[:80])
    first = make(tmp_path, input=f"{folders[0]}/*.jsonl")
    folders[0].rename(folders[1])
    pattern = f"{folders[1]}/*.jsonl"
    assert make(tmp_path, input=pattern) == first
    with pytest.raises(UserError, match="made of 1 files, and not of the 2 .* now"):
        make(tmp_path, input=pattern, valid_input=pattern)
    write_lines(folders[1] / "b.jsonl", texts[80:])
    with pytest.raises(UserError, match="made of 1 files, and not of the 2 .* now"):
        make(tmp_path, input=pattern)
    (folders[1] / "a.jsonl").unlink()
    with pytest.raises(UserError, match="made of 1 files, and not of the 1 .* now"):
        make(tmp_path, input=pattern)


def test_a_corpus_of_a_version_that_kept_no_hash_of_its_files_is_known_by_its_command(tmp_path, texts):
    path = write_lines(tmp_path / "a.jsonl", texts)
    manifest = make(tmp_path, input=path)
    del manifest["inputs_sha256"]
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    assert make(tmp_path, input=path) == manifest
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="was not made by this command"):
        make(tmp_path, input=str(tmp_path / "b.jsonl"))


def test_it_is_said_that_nothing_was_read(corpus_path, corpus, capsys):
    build(Recipe(**corpus.manifest["arguments"]), str(corpus_path), workers=1)
    assert capsys.readouterr().out == f"{corpus_path} holds this corpus already; nothing was read\n"


def _prepare(path, output, pid):
    os.getpid = lambda: pid
    build(Recipe(input=path, vocab_size=384, valid_fraction=0.2), output, workers=1, quiet=True)


def test_an_interrupted_run_leaves_nothing_that_looks_done(tmp_path, texts):
    """Nor anything in the way of the next, which may have its process number, as in containers."""
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
    make(tmp_path, input=path)  # clears away what was left, and succeeds
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "corpus"]


def test_a_damaged_corpus_is_noticed(tmp_path, texts):
    make(tmp_path, input=write_lines(tmp_path / "a.jsonl", texts))
    shard = sorted((tmp_path / "corpus").glob("train-*.array_record"))[0]
    whole = shard.read_bytes()

    middle = whole.index(b"\x28\xb5\x2f\xfd") + 20  # inside the first zstd frame
    shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    documents = Corpus(str(tmp_path / "corpus")).documents("train")
    with pytest.raises(UserError, match="damaged"):
        documents.read(range(len(documents)))

    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short"):
        Corpus(str(tmp_path / "corpus"))
    shard.unlink()
    with pytest.raises(UserError, match="missing"):
        Corpus(str(tmp_path / "corpus"))


def test_a_manifest_cannot_point_outside_its_folder(tmp_path, texts):
    make(tmp_path, input=write_lines(tmp_path / "a.jsonl", texts))
    path = tmp_path / "corpus" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["lengths"] = "../a.jsonl"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="outside"):
        Corpus(str(tmp_path / "corpus"))
