"""Lengths of documents in groups, and the first records of documents."""

import json
import shutil

import numpy as np
import pytest
from etils import epath

from dualsm.data import document_lengths
from dualsm.data.corpus import Corpus
from dualsm.data.document_lengths import (
    RECORD_TOKENS,
    DocumentLengths,
    index_lengths,
    open_lengths,
    record_count,
)
from dualsm.data.record_index import RecordIndex
from dualsm.process.errors import UserError

LENGTHS = np.random.default_rng(0).integers(1, 5000, 103).astype("<i4")


@pytest.fixture
def stored(tmp_path):
    """Returns a folder with the lengths of a split in groups of ten, and the entry in the manifest."""
    (tmp_path / "lengths").write_bytes(LENGTHS.tobytes())
    (tmp_path / "index").write_bytes(index_lengths(LENGTHS, 10).tobytes())
    split = {"lengths": "lengths", "lengths_index": "index", "shards": [{"documents": n} for n in (50, 53)]}
    return epath.Path(tmp_path), split


@pytest.mark.parametrize("version", ["with an index", "of earlier versions"])
def test_lengths_are_read_in_groups(stored, version, monkeypatch):
    folder, split = stored
    read = []
    pread = document_lengths.read_ranges
    monkeypatch.setattr(
        document_lengths, "read_ranges", lambda p, ranges: read.extend(ranges) or pread(p, ranges)
    )
    monkeypatch.setattr(document_lengths, "_GROUPS_PER_READ", 3)
    if version == "of earlier versions":
        del split["lengths_index"]
    lengths = open_lengths(folder, split, 10)
    assert read == []
    assert lengths.token_ends_M.tolist() == [int(LENGTHS[: 10 * k].sum()) for k in range(1, 12)]
    assert len(lengths) == 103 and lengths.tokens == LENGTHS.sum()
    assert lengths.records == record_count(LENGTHS).sum()
    assert lengths.read([10, 0, 4]).tolist() == [*LENGTHS[100:], *LENGTHS[:10], *LENGTHS[40:50]]
    assert read == [(400, 412), (0, 40), (160, 200)]
    document_S = np.array([102, 0, 57, 57, 100])
    assert lengths.at(document_S).tolist() == LENGTHS[document_S].tolist()


@pytest.mark.parametrize("position", [0, 41, 411])
def test_a_flipped_byte_is_detected_when_its_group_is_read(stored, position):
    folder, split = stored
    lengths = open_lengths(folder, split, 10)
    content = bytearray(LENGTHS.tobytes())
    content[position] ^= 4
    (folder / "lengths").write_bytes(bytes(content))
    for group in range(11):
        if group == position // 40:
            with pytest.raises(UserError, match="lengths is damaged"):
                lengths.read([group])
        else:
            lengths.read([group])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lengths", LENGTHS.tobytes()[:-4], "does not match the shards"),
        ("index", index_lengths(LENGTHS, 10).tobytes()[:-24], "does not match the shards"),
        ("index", b"123", "the index of .* is damaged"),
        ("lengths", None, "cannot read .*lengths"),
        ("index", None, "cannot read .*lengths"),
    ],
)
def test_files_that_do_not_match_are_rejected(stored, name, content, message):
    folder, split = stored
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_lengths(folder, split, 10)


def test_a_corpus_of_an_earlier_version_has_the_same_documents(corpus_path, tmp_path):
    """It has no index of the lengths."""
    old = shutil.copytree(corpus_path, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    for split in manifest["splits"].values():
        (old / split.pop("lengths_index")).unlink()
        del split["lengths_index_sha256"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    for name in ("train", "valid"):
        found, expected = (Corpus(str(path)).documents(name) for path in (old, corpus_path))
        assert found.lengths_N.tolist() == expected.lengths_N.tolist()
        assert found.lengths.token_ends_M.tolist() == expected.lengths.token_ends_M.tolist()
        for a, b in zip(found.read(range(len(found))), expected.read(range(len(found))), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("max_groups", [1, 2, 5, 11, 256])
def test_first_records_of_documents(max_groups):
    lengths = DocumentLengths.from_array(LENGTHS, group_size=10)
    index = RecordIndex(lengths, max_groups)
    records_N = -(-LENGTHS // RECORD_TOKENS)
    first_N = np.cumsum(records_N) - records_N
    rng = np.random.default_rng(max_groups)
    for size in (1, 3, 103, 7, 50, 2):
        document_S = rng.integers(0, 103, size)
        assert index.first(document_S).tolist() == first_N[document_S].tolist()


def test_offsets_of_a_bounded_number_of_groups_are_in_memory():
    lengths, read = DocumentLengths.from_array(LENGTHS, group_size=10), []
    read_groups = lengths._read_groups
    lengths._read_groups = lambda group_K: read.extend(group_K) or read_groups(group_K)
    index = RecordIndex(lengths, 4)
    for _ in range(3):
        index.first(np.arange(20, 60))
    assert read == [2, 3, 4, 5]
    index.first(np.array([70]))
    assert read == [2, 3, 4, 5, 7]
    assert index._offset_CxG.size == 40
