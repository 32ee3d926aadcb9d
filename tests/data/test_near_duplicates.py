"""Near duplicates: exactly those that a comparison of all pairs finds, for any number of workers."""

import hashlib
import json
import random
import re
import sys

import numpy as np
import pytest

from dualsm.data.build import Recipe, build
from dualsm.data.near_duplicates import REPORT, jaccard, shingles
from dualsm.process.errors import UserError
from tests.data.test_build import texts_of, write_lines

WORDS = [f"word{i}" for i in range(500)]
FRACTION, SIMILARITY = 0.3, 0.75


def shingle_set(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    n = min(n, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if n else set()


def similarity(a: str, b: str, n: int) -> float:
    one, two = shingle_set(a, n), shingle_set(b, n)
    return len(one & two) / len(one | two) if one | two else 0.0


def clusters(seed: int) -> list[str]:
    """Returns random texts, each with edited copies, in a random order."""
    rng = random.Random(seed)
    texts = ["...", "!!!", "Hello, world", "hello world!", "hello World"]
    for _ in range(25):
        words = rng.choices(WORDS, k=rng.randrange(60, 200))
        for edits in (0, 1, 2, 10):  # the similarity is about 1, 0.95, 0.9 and below 0.6
            edited = list(words)
            for place in rng.sample(range(len(words)), edits):
                edited[place] = rng.choice(WORDS)
            if edits % 2:
                edited[0] = edited[0].upper() + "!"
            texts.append(" ".join(edited))
    rng.shuffle(texts)
    return texts


@pytest.mark.parametrize("n", [1, 5])
def test_similarities_equal_those_of_sets(n):
    texts = clusters(1)[:40]
    for a in texts:
        for b in texts:
            sets = [shingles(text.encode(), n) for text in (a, b)]
            assert sorted(map(len, sets)) == sorted(len(shingle_set(text, n)) for text in (a, b))
            if len(sets[0]) and len(sets[1]):
                assert jaccard(*sets) == similarity(a, b, n)


@pytest.mark.parametrize(
    ("alphabet", "size"), [("天地玄黄宇宙洪荒日月盈昃", 1), ("กขคงจฉชซญดตถ", 1), ("abcdefgh", 2)]
)
def test_scripts_without_spaces_have_a_word_per_character(alphabet, size):
    """One changed character of 400 changes at most n of the n-grams; a text of one word has only one."""
    rng = random.Random(0)
    text = "".join(rng.choices(alphabet, k=400))
    sets = [shingles(one.encode(), 5) for one in (text, text[:-1] + "é")]
    assert jaccard(*sets) == (0 if size > 1 else pytest.approx(395 / 397, abs=0.01))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Returns folder -> manifest of the same texts, prepared in two ways, and the texts."""
    pytest.importorskip("datasketch", reason="datasketch is not installed (extra dedup)")
    folder, texts = tmp_path_factory.mktemp("near"), clusters(0)
    half = len(texts) // 2
    write_lines(folder / "a.jsonl", texts[:half])
    write_lines(folder / "b.jsonl", texts[half:])
    write_lines(folder / "c.jsonl", texts[::-1])
    recipe = {"vocab_size": 384, "valid_fraction": FRACTION, "deduplicate": "near"}
    recipe["near_similarity"] = SIMILARITY
    manifests = {}
    for name, input, workers in (("one", "[ab].jsonl", 1), ("two", "c.jsonl", 2)):
        made = build(Recipe(str(folder / input), **recipe), str(folder / name), workers, quiet=True)
        manifests[folder / name] = made
    return manifests, texts


def test_the_result_does_not_depend_on_workers_and_files(built):
    one, two = built[0]
    assert built[0][one]["identity"] == built[0][two]["identity"]
    assert (one / REPORT).read_bytes() == (two / REPORT).read_bytes()


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def held_out(text: str) -> bool:
    return int.from_bytes(digest(text)[8:], "big") < FRACTION * 2.0**64


def test_documents_are_those_that_a_comparison_of_all_pairs_keeps(built):
    """Documents are visited by split and hash; held-out documents are kept in preference to others."""
    manifests, texts = built
    folder, manifest = next(iter(manifests.items()))
    kept, dropped = [], {}
    for text in sorted(set(texts), key=lambda text: (not held_out(text), digest(text))):
        similarities = [similarity(text, other, 5) for other in kept]
        if max(similarities, default=0) >= SIMILARITY:
            dropped[digest(text).hex()] = (kept[np.argmax(similarities)], max(similarities))
        else:
            kept.append(text)
    assert sorted(texts_of(folder, "valid")) == sorted(filter(held_out, kept))
    assert sorted(texts_of(folder, "train")) == sorted(text for text in kept if not held_out(text))
    assert {"...", "!!!"} <= set(kept)  # without words, they resemble no other document
    report = [json.loads(line) for line in (folder / REPORT).read_text().splitlines()]
    assert len(report) == len(dropped) == manifest["documents_near_duplicate"]
    splits = set()
    for entry in report:
        of, expected = dropped.pop(entry["dropped"]["blake2b"])
        assert entry["similarity"] == expected
        assert entry["kept"] == {
            "blake2b": digest(of).hex(),
            "split": "valid" if held_out(of) else "train",
            "bytes": len(of.encode()),
            "start": of[:200],
        }
        splits.add((entry["dropped"]["split"], entry["kept"]["split"]))
    assert splits == {("train", "train"), ("train", "valid"), ("valid", "valid")}


def test_at_similarity_1_only_documents_with_the_same_ngrams_are_dropped(tmp_path):
    pytest.importorskip("datasketch", reason="datasketch is not installed (extra dedup)")
    texts = clusters(2)
    texts += [text.upper() + "!" for text in texts[::3]]
    path = write_lines(tmp_path / "a.jsonl", texts)
    recipe = Recipe(path, vocab_size=384, valid_fraction=0.3, deduplicate="near", near_similarity=1.0)
    manifest = build(recipe, str(tmp_path / "out"), 1, quiet=True)
    unique = {text for text in texts if shingle_set(text, 5)}
    sets = {frozenset(shingle_set(text, 5)) for text in unique}
    assert manifest["documents_near_duplicate"] == len(unique) - len(sets) > 10


def test_a_split_without_documents_raises(tmp_path):
    pytest.importorskip("datasketch", reason="datasketch is not installed (extra dedup)")
    path = write_lines(tmp_path / "a.jsonl", [f"the same words {'!' * i}" for i in range(30)])
    recipe = Recipe(path, vocab_size=384, valid_fraction=0.5, deduplicate="near")
    with pytest.raises(UserError, match="leaves no documents to train on; raise --near_similarity=0.8"):
        build(recipe, str(tmp_path / "out"), 1, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_missing_library_is_one_line(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", ["a", "b"])
    monkeypatch.setitem(sys.modules, "datasketch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"datasketch is not installed; run pip install 'dualsm\[dedup\]'"):
        build(Recipe(path, vocab_size=384, deduplicate="near"), str(tmp_path / "out"), 1, quiet=True)
