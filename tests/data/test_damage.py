"""A corpus that was changed on disk is not read as if it were whole."""

import json
import os
import shutil
import signal

import pytest

from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.data.workers import pool_of
from dualsm.process.errors import UserError
from tests.fuzzing.artefacts import real_texts
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


def test_a_flipped_bit_anywhere_in_a_shard_is_noticed(small, copy):
    """By the hash in the manifest always; by reading, wherever it would change what is read."""
    shard = min(copy.glob("train-*.array_record"), key=lambda path: path.stat().st_size)
    whole, expected = shard.read_bytes(), read_all(small)
    places = [place for place, byte in enumerate(whole) if byte]  # the rest is padding
    assert len(places) > 500
    unread = 0
    for place in places[:: len(places) // 100]:
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(UserError, match=f"{shard.name} is damaged"):
            Corpus(str(copy)).verify("train")
        try:
            assert read_all(copy) == expected
        except UserError:
            unread += 1
    assert unread > 50


def test_flipped_lengths_are_noticed(copy):
    lengths = copy / "train-lengths.int32"
    content = bytearray(lengths.read_bytes())
    content[0] += 1  # a token moves from the second document to the first; their sum is the same
    content[4] -= 1
    lengths.write_bytes(content)
    with pytest.raises(UserError, match="train-lengths.int32 is damaged"):
        Corpus(str(copy)).documents("train")


def test_a_shard_of_another_corpus_is_noticed(small, copy, tmp_path):
    names = [shard["file"] for shard in Corpus(str(small)).manifest["splits"]["train"]["shards"]]
    Corpus(str(copy)).verify("train")
    (copy / names[0]).write_bytes((small / names[1]).read_bytes())
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0]["size"] = (copy / names[0]).stat().st_size
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is damaged: its content is not what was written"):
        Corpus(str(copy)).verify("train")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", ".", "", "a/b", "x\0", ".hidden"])
@pytest.mark.parametrize("field", ["file", "lengths"])
def test_a_manifest_names_files_of_its_folder_only(copy, name, field):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    split = manifest["splits"]["train"]
    (split if field == "lengths" else split["shards"][0])[field] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="names a file outside its folder"):
        Corpus(str(copy))


def die(_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_told_of():
    with pytest.raises(UserError, match="worker process was killed"), pool_of(2) as pool:
        pool.submit(die, None).result()


def test_one_process_makes_what_several_make(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in real_texts()))
    recipe = Recipe(input=str(path), vocab_size=384, valid_fraction=0.2)
    one, two = (build(recipe, str(tmp_path / f"{n}"), workers=n, quiet=True) for n in (1, 2))
    assert one == two
