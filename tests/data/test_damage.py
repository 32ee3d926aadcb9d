"""Damaged and modified corpora raise errors."""

import errno
import functools
import json
import operator
import os
import pickle
import shutil
import signal

import pytest

from dualsm.data import record_reader, verification
from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.data.damaged_corpus import DamagedCorpus
from dualsm.data.workers import worker_pool
from dualsm.process import paths
from dualsm.process.errors import BucketError, UserError
from tests.fuzzing.artifacts import real_texts
from tests.fuzzing.corpora import make_corpus


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("small"), real_texts())


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small, tmp_path / "corpus")


def read_all(folder) -> list[list[int]]:
    documents = Corpus(str(folder)).documents("train")
    return [tokens.tolist() for tokens in documents.read(range(len(documents)))]


def test_a_flipped_bit_in_a_shard_is_detected(small, copy):
    """`verify` detects every flipped bit; `read` detects those that would change the tokens."""
    shard = min(copy.glob("train-*.array_record"), key=lambda path: path.stat().st_size)
    content, expected = shard.read_bytes(), read_all(small)
    positions = [position for position, byte in enumerate(content) if byte]  # zeros are padding
    assert len(positions) > 500
    detected = 0
    for i in positions[:: len(positions) // 100]:
        shard.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        with pytest.raises(UserError, match=f"{shard.name} is damaged"):
            Corpus(str(copy)).verify("train")
        try:
            assert read_all(copy) == expected
        except UserError:
            detected += 1
    assert detected > 50


def test_the_advice_for_a_damaged_corpus_is_to_remove_it_first():
    """`prepare` would not write into its folder."""
    error = DamagedCorpus("the file is missing")
    for copy in (error, pickle.loads(pickle.dumps(error))):
        assert str(copy) == (
            "the file is missing; copy the corpus again, or remove its folder and prepare it again"
        )
        assert copy.damage == "the file is missing"


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "train-lengths.int32", "train-lengths-index.int64", "valid-bytes.int64"]
)
def test_a_missing_file_is_reported_at_the_start(copy, name):
    (copy / name).unlink()
    with pytest.raises(DamagedCorpus, match=f"corpus file {copy / name} is missing; .*remove its folder"):
        Corpus(str(copy))


@pytest.mark.parametrize("part", ["record", "index"])
def test_an_unreadable_record_or_index_is_reported_with_its_shard(small, copy, part):
    entry = Corpus(str(small)).manifest["splits"]["train"]
    shard = max(entry["shards"], key=lambda shard: shard["size"])
    content = bytearray((copy / shard["file"]).read_bytes())
    content[{"record": 128, "index": (1 << 16) + 32}[part]] ^= 1  # the index starts a block of 64 KiB
    (copy / shard["file"]).write_bytes(content)
    with pytest.raises(UserError, match=f"corpus shard {copy / shard['file']} is damaged"):
        read_all(copy)


def test_damage_found_in_the_background_ends_reading_and_names_the_shard(small, copy):
    """A shard that was replaced by another one is readable, so only its hash reveals it."""
    names = [shard["file"] for shard in Corpus(str(small)).manifest["splits"]["train"]["shards"]]
    (copy / names[0]).write_bytes((small / names[1]).read_bytes())
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0]["size"] = (copy / names[0]).stat().st_size
    path.write_text(json.dumps(manifest))
    corpus = Corpus(str(copy))
    documents = corpus.documents("valid")
    documents.read([0])
    corpus.start_verification()
    with pytest.raises(UserError, match=f"{names[0]} is damaged .its hash has changed"):
        corpus.finish_verification()
    with pytest.raises(UserError, match=f"{names[0]} is damaged"):
        documents.read([0])


def test_an_intact_corpus_passes_the_verification(small):
    corpus = Corpus(str(small))
    corpus.start_verification()
    corpus.finish_verification()
    assert corpus.documents("train").read([0])


def test_an_unexpected_exception_of_a_verification_thread_is_raised(small, monkeypatch):
    """Its shards are not verified, so the verification does not end as if they were intact."""

    def fail(path):
        raise RuntimeError("503 of the bucket")

    corpus = Corpus(str(small))
    documents = corpus.documents("train")
    monkeypatch.setattr(verification, "sha256", fail)
    corpus.start_verification()
    with pytest.raises(RuntimeError, match="503"):
        corpus.finish_verification()
    with pytest.raises(RuntimeError, match="503"):
        documents.read([0])


def test_shards_in_a_bucket_are_read_again_after_an_error(monkeypatch):
    attempts = []

    def fail_twice(path):
        attempts.append(path)
        if len(attempts) < 3:
            raise ConnectionResetError("the connection was reset")
        return "hash"

    monkeypatch.setattr(verification, "sha256", fail_twice)
    monkeypatch.setattr(paths.time, "sleep", lambda seconds: None)
    verification.Verification({"gs://bucket/shard": "hash"}).finish()
    assert len(attempts) == 3


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(RuntimeError("503"), BucketError), (FileNotFoundError("shard"), UserError), (None, UserError)],
)
def test_records_in_a_bucket_that_does_not_answer_are_not_damaged(small, monkeypatch, answer, expected):
    """A user error would end the run for good; launchers repeat a command that could not reach its bucket."""

    def fail(*args):
        raise BucketError(errno.EIO, "503", "gs://bucket/shard")

    def size_and_time(shard):
        if answer is not None:
            raise answer

    monkeypatch.setattr(record_reader, "retry", fail)
    monkeypatch.setattr(record_reader, "is_remote", lambda path: True)
    monkeypatch.setattr(record_reader, "size_and_time", size_and_time)
    documents = Corpus(str(small)).documents("train")
    with pytest.raises(expected, match="503"):
        documents.read([0])


def test_changed_lengths_are_detected(copy):
    lengths = copy / "train-lengths.int32"
    content = bytearray(lengths.read_bytes())
    content[0] += 1  # move a token from the second document to the first, with the same total
    content[4] -= 1
    lengths.write_bytes(content)
    with pytest.raises(UserError, match="train-lengths.int32 is damaged .a checksum"):
        Corpus(str(copy)).documents("train").read([0])
    with pytest.raises(UserError, match="train-lengths.int32 is damaged .its hash"):
        Corpus(str(copy)).verify("train")


def test_a_changed_index_of_the_lengths_is_detected(copy):
    index = copy / "train-lengths-index.int64"
    content = bytearray(index.read_bytes())
    content[-8] ^= 1
    index.write_bytes(content)
    with pytest.raises(UserError, match="train-lengths-index.int64 is damaged"):
        Corpus(str(copy)).documents("train")


def test_a_replaced_shard_is_detected(small, copy, tmp_path):
    names = [shard["file"] for shard in Corpus(str(small)).manifest["splits"]["train"]["shards"]]
    Corpus(str(copy)).verify("train")
    (copy / names[0]).write_bytes((small / names[1]).read_bytes())
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0]["size"] = (copy / names[0]).stat().st_size
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is damaged .its hash has changed"):
        Corpus(str(copy)).verify("train")


@pytest.mark.parametrize("value", [None, 7, "missing"])
@pytest.mark.parametrize(
    "keys",
    [
        ("identity",), ("tokenizer_sha256",), ("vocabulary",), ("splits", "valid", "gzip_bytes"),
        ("splits", "train", "tokens"), ("splits", "train", "bytes"), ("splits", "train", "lengths"),
        ("splits", "train", "lengths_sha256"), ("splits", "train", "lengths_index_sha256"),
        ("splits", "train", "shards", 0, "file"),
        ("splits", "train", "shards", 0, "size"), ("splits", "train", "shards", 0, "sha256"),
    ],
)  # fmt: skip
def test_missing_and_wrong_keys_of_a_manifest_are_rejected(copy, keys, value):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    owner = functools.reduce(operator.getitem, keys[:-1], manifest)
    if value == "missing":
        del owner[keys[-1]]
    else:
        owner[keys[-1]] = "7" if value == 7 and isinstance(owner[keys[-1]], int) else value
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        corpus = Corpus(str(copy))
        corpus.verify("train")
        corpus.documents("train")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", ".", "", "a/b", "x\0", ".hidden"])
@pytest.mark.parametrize("field", ["file", "lengths"])
def test_a_manifest_refers_to_files_in_its_folder_only(copy, name, field):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    split = manifest["splits"]["train"]
    (split if field == "lengths" else split["shards"][0])[field] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is outside the corpus folder"):
        Corpus(str(copy))


def die(_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_raises():
    with pytest.raises(UserError, match="worker process was killed"), worker_pool(2) as pool:
        pool.submit(die, None).result()


def test_the_corpus_does_not_depend_on_the_number_of_processes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in real_texts()))
    recipe = Recipe(input=str(path), vocab_size=384, valid_fraction=0.2)
    one, two = (build(recipe, str(tmp_path / f"{n}"), workers=n, quiet=True) for n in (1, 2))
    assert one == two
