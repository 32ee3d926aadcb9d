"""Shards are opened when they are first read, and checked then."""

import json
import os
import shutil
from concurrent import futures

import numpy as np
import pytest
from grain.sources import ArrayRecordDataSource

from dualsm.data import build, record_reader
from dualsm.data.batches import BatchSource, OrderedDocuments
from dualsm.data.corpus import Corpus
from dualsm.data.sequence_order import SequenceOrder
from dualsm.process import paths
from dualsm.process.errors import UserError
from tests.fuzzing.artifacts import real_texts
from tests.fuzzing.corpora import make_corpus

SHARDS, BATCH_SIZE, SEQ_LEN = 48, 2, 32


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """Returns a corpus with more shards than a batch has sequences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_MIN_BUCKETS", SHARDS)
        return make_corpus(tmp_path_factory.mktemp("many"), real_texts("json/*.py"))


@pytest.fixture
def copy(many_shards, tmp_path):
    return shutil.copytree(many_shards, tmp_path / "corpus")


def entries_of(folder) -> list[dict]:
    return json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"]


def change_entries(folder, change) -> None:
    """Calls `change` with the manifest's entries of the training shards, and writes them back."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["splits"]["train"]["shards"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def batch_source(folder) -> BatchSource:
    documents = Corpus(str(folder)).documents("train")
    order = SequenceOrder(documents.lengths, 64 * BATCH_SIZE * SEQ_LEN, SEQ_LEN, 1, seed=0)
    return BatchSource(
        [OrderedDocuments(documents, order)], BATCH_SIZE, SEQ_LEN, 0, local_rows=range(BATCH_SIZE)
    )


def read_all(folder) -> list[list[int]]:
    documents = Corpus(str(folder)).documents("train")
    return [tokens.tolist() for tokens in documents.read(range(len(documents)))]


def open_shards(folder) -> list[str]:
    """Returns the names of the shards in a folder that this process has open, one per descriptor."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:  # the descriptor of the listing
            continue
        if os.path.dirname(path) == str(folder) and path.endswith(".array_record"):
            names.append(os.path.basename(path))
    return sorted(names)


def test_records_equal_those_of_a_source_that_opens_all_shards(many_shards):
    entries = entries_of(many_shards)
    source = ArrayRecordDataSource([str(many_shards / entry["file"]) for entry in entries])
    assert len(entries) > SHARDS / 2 and len(source) == sum(entry["records"] for entry in entries)
    stored = np.frombuffer(b"".join(source[i] for i in range(len(source))), "<u2")
    assert np.array_equal(np.concatenate(read_all(many_shards)), stored)


def test_the_first_batch_opens_only_the_shards_of_its_sequences(many_shards, copy):
    """All other shards are replaced by bytes of the same size that cannot be opened."""
    intact = batch_source(many_shards)
    expected, used = intact[0], set(open_shards(many_shards))
    assert 0 < len(used) < SHARDS / 3
    for entry in entries_of(copy):
        if entry["file"] not in used:
            (copy / entry["file"]).write_bytes(b"\1" * entry["size"])
    source = batch_source(copy)
    assert not open_shards(copy)
    assert np.array_equal(source[0]["tokens"], expected["tokens"])
    assert set(open_shards(copy)) == used
    with pytest.raises(UserError, match=rf"corpus shard {copy}/train-\d+-of-\d+.array_record is damaged"):
        read_all(copy)


def test_threads_open_each_shard_once(copy):
    documents = Corpus(str(copy)).documents("train")
    everything = range(len(documents))
    with futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: documents.read(everything), range(8)))
    assert all(np.array_equal(np.concatenate(one), np.concatenate(found[0])) for one in found)
    assert open_shards(copy) == sorted(entry["file"] for entry in entries_of(copy))


def test_a_corpus_without_the_numbers_of_records_is_read(many_shards, copy):
    """Earlier versions did not write them."""
    change_entries(copy, lambda entries: [entry.pop("records") for entry in entries])
    assert read_all(copy) == read_all(many_shards)
    source = batch_source(copy)
    for step in (0, 7, 31):
        assert np.array_equal(source[step]["tokens"], batch_source(many_shards)[step]["tokens"])


def test_a_wrong_number_of_records_is_detected(copy):
    """It is found at the start if the sum is wrong, and otherwise when the shard is opened."""
    entries = entries_of(copy)
    larger = max(range(1, len(entries)), key=lambda shard: entries[shard]["records"])
    assert entries[larger]["records"] > 1

    def move_a_record(entries):
        entries[0]["records"] += 1
        entries[larger]["records"] -= 1

    change_entries(copy, move_a_record)
    documents = Corpus(str(copy)).documents("train")
    name, count = entries[larger]["file"], entries[larger]["records"]
    with pytest.raises(UserError, match=f"{name} is damaged .it has {count} records instead of {count - 1}"):
        documents.read([sum(entry["documents"] for entry in entries[: larger + 1]) - 1])
    change_entries(copy, lambda entries: entries[0].update(records=entries[0]["records"] + 1))
    with pytest.raises(UserError, match="train-lengths.int32 does not match the shards"):
        Corpus(str(copy)).documents("train")


@pytest.mark.parametrize("value", [None, 0, "3", 1.5])
def test_an_invalid_number_of_records_is_rejected(copy, value):
    change_entries(copy, lambda entries: entries[3].update(records=value))
    with pytest.raises(UserError, match=r"manifest.json is damaged .*is not a positive integer"):
        Corpus(str(copy))


@pytest.mark.parametrize("left", [None, 100])
def test_a_missing_or_truncated_shard_is_reported_at_the_start(copy, left):
    shard = copy / entries_of(copy)[-1]["file"]
    if left is None:
        shard.unlink()
    else:
        os.truncate(shard, left)
    with pytest.raises(UserError, match=f"{shard} is missing or truncated; .* remove its folder"):
        Corpus(str(copy))


def test_a_shard_that_disappears_after_the_start_is_reported(copy):
    documents = Corpus(str(copy)).documents("train")
    shard = copy / entries_of(copy)[0]["file"]
    shard.unlink()
    with pytest.raises(UserError, match=f"corpus shard {shard} is damaged or missing"):
        documents.read([0])


def test_a_shard_in_a_bucket_is_opened_again_after_an_error(monkeypatch):
    """Opening does not raise: the reader has no records, and its error, then."""
    opened = []

    class Reader:
        def __init__(self, path, **options):
            opened.append(path)

        def ok(self):
            return len(opened) > 2

        def close(self):
            raise RuntimeError("503 of the bucket")

        def num_records(self):
            return 3 if self.ok() else 0

        def read(self, positions):
            return [b"%d" % position for position in positions]

    monkeypatch.setattr(record_reader, "ArrayRecordReader", Reader)
    monkeypatch.setattr(paths.time, "sleep", lambda seconds: None)
    records = record_reader.RecordReader(["gs://bucket/shard"], [3])
    assert records.read([2, 0, 2]) == [b"2", b"0", b"2"]
    assert opened == ["gs://bucket/shard"] * 3
