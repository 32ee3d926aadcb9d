"""Documents that overlap task texts are dropped: exactly those, for any number of workers."""

import json
import random
import re

import numpy as np
import pytest

from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.data.decontamination import TaskNgrams
from dualsm.data.words import hash_words, ngram_hashes, words_of
from dualsm.evaluation.task_texts import read_task_texts
from dualsm.process.errors import UserError
from tests.data.test_build import texts_of, write_lines

WORDS = [f"w{i}" for i in range(4)]


def overlaps(document: str, text: str, n: int) -> bool:
    """Compares all n-grams of words as strings."""

    def words(of):
        return re.sub(r"[^\w\s]", "", of.lower()).split()

    if len(words(text)) < min(n, 8):
        return False
    size = min(n, len(words(text)))
    grams = [[words(of)[i : i + size] for i in range(len(words(of)) - size + 1)] for of in (document, text)]
    return any(gram in grams[1] for gram in grams[0])


def random_text(rng: random.Random, size: int) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randrange(size))]
    return "".join(
        rng.choice([str.upper, str])(word) + rng.choice([" ", ", ", "\n", "! ", " - "]) for word in words
    )


@pytest.mark.parametrize("n", [1, 3, 5, 10])
def test_matches_equal_those_of_all_pairs_of_ngrams(n):
    rng = random.Random(n)
    texts = {f"file{i}": [random_text(rng, max(9, n + 3)) for _ in range(2)] for i in range(4)}
    ngrams = TaskNgrams.of(texts, n)
    found = 0
    for _ in range(300):
        document = random_text(rng, 12) + " " + rng.choice(rng.choice(list(texts.values()))) * (n > 5)
        expected = [
            index
            for index, of in enumerate(texts.values())
            if any(overlaps(document, text, n) for text in of)
        ]
        assert ngrams.matches(document) == expected
        found += len(expected)
    assert 0 < found < 1200


def test_an_overlap_has_13_words():
    words = [f"word{i}" for i in range(40)]
    ngrams = TaskNgrams.of({"a": [" ".join(words)]}, 13)
    assert ngrams.matches("x " + "; ".join(words[5:18]).upper() + ". y") == [0]
    assert ngrams.matches("x " + " ".join(words[5:17]) + " y") == []


def test_texts_of_fewer_than_8_words_are_not_compared():
    words = [f"word{i}" for i in range(8)]
    ngrams = TaskNgrams.of({"a": ["Stars are hot", " ".join(words[:7])], "b": [" ".join(words)]}, 13)
    assert ngrams.skipped == 2
    assert ngrams.matches("stars are hot " + " ".join(words[:7])) == []
    assert ngrams.matches("stars are hot " + " ".join(words)) == [1]


def test_words_are_in_lower_case_without_punctuation():
    assert words_of("“Don't”, said\tÉva – 3€ __x__ 中文。") == ["dont", "said", "éva", "3", "x", "中", "文"]
    hashes = ngram_hashes(hash_words("a b a b"), 2)
    assert len(set(hashes.tolist())) == 2 and hashes[0] == hashes[2] and hashes.dtype == np.uint64


CAT = "cat run around in the old garden"
GOAL = "How do I boil an egg in a small pot?"


@pytest.fixture
def tasks(tmp_path):
    """Returns a folder with a task of two files, and another task of one file."""
    folder = tmp_path / "eval"
    (folder / "blimp").mkdir(parents=True)
    for name in ("one", "two"):
        pair = {"sentence_good": f"The {name} cat runs very fast.", "sentence_bad": f"The {name} {CAT}."}
        (folder / "blimp" / f"{name}.jsonl").write_text(json.dumps(pair))
    question = {"goal": GOAL, "sol1": "Use water.", "sol2": "Use sand.", "label": 0}
    (folder / "piqa.jsonl").write_text(json.dumps(question))
    return folder


def test_texts_are_prompts_with_and_without_their_own_words_and_long_questions(tasks):
    assert read_task_texts(str(tasks)) == {
        f"{tasks}/blimp/one.jsonl": ["The one cat runs very fast.", f"The one {CAT}."],
        f"{tasks}/blimp/two.jsonl": ["The two cat runs very fast.", f"The two {CAT}."],
        f"{tasks}/piqa.jsonl": [
            f" {GOAL}\n Use water.",
            f" {GOAL}\n Use sand.",
            f"Question: {GOAL}\nAnswer: Use water.",
            f"Question: {GOAL}\nAnswer: Use sand.",
            f" {GOAL}\n",
        ],
    }
    assert list(read_task_texts(f"{tasks}/blimp")) == [
        f"{tasks}/blimp/{name}.jsonl" for name in ("one", "two")
    ]
    assert len(read_task_texts(f"{tasks}/blimp/two.jsonl,{tasks}/piqa.jsonl")) == 2


def test_prompts_of_the_evaluation_match(tmp_path):
    """The words of the prompt are between those of the question and the answer."""
    question = {"goal": "What do plants take from air?", "sol1": "carbon dioxide", "sol2": "iron", "label": 0}
    (tmp_path / "piqa.jsonl").write_text(json.dumps(question))
    ngrams = TaskNgrams.of(read_task_texts(str(tmp_path)), 13)
    for document in (
        "x Question: What do plants take from air?\nAnswer: carbon dioxide. y",
        "x What do plants take from air? Carbon dioxide. y",
    ):
        assert ngrams.matches(document) == [0]
    assert ngrams.matches("What do plants take from air? Answer: carbon dioxide") == []


def test_task_files_that_are_not_found_raise(tasks, tmp_path):
    (tmp_path / "x.jsonl").write_text("{}")
    for path, message in {
        tmp_path / "none": "--decontaminate: .*none does not exist",
        tmp_path / "x.jsonl": "belongs to no known task; name the file or its folder after one of blimp",
        tmp_path: "contains no files of the tasks blimp",
        ",": "--decontaminate is empty",
    }.items():
        with pytest.raises(UserError, match=message):
            read_task_texts(str(path))


def test_contaminated_documents_are_dropped_and_counted(tasks, tmp_path, documents):
    clean = documents[:60]
    dirty = [f"See: THE ONE {CAT.upper()}...", f"x the two {CAT[:8]}, {CAT[8:]} y", f"{GOAL}\nUse water"]
    both = f"the one {CAT} the two {CAT}"
    short = ["the one cat runs very fast", "How do I boil an egg in a?"]
    path = write_lines(tmp_path / "a.jsonl", [*clean, *dirty, both, both, *short])
    recipe = Recipe(path, vocab_size=384, valid_fraction=0.2, decontaminate=str(tasks))
    texts = read_task_texts(recipe.decontaminate)
    identities = set()
    for workers in (1, 2):
        out = str(tmp_path / f"out{workers}")
        manifest = build(recipe, out, workers, quiet=True, task_texts=texts)
        identities.add(manifest["identity"])
        found = texts_of(out, "train") + texts_of(out, "valid")
        assert sorted(found) == sorted({*clean, *short})
        assert manifest["task_texts_skipped"] == 2
        assert manifest["documents_contaminated"] == {
            "all": 5,
            "by_task_file": dict(zip(texts, [3, 3, 1], strict=True)),
        }
    assert len(identities) == 1
    assert build(recipe, out, 1, quiet=True, task_texts=texts) == Corpus(out).manifest
    (tasks / "piqa.jsonl").unlink()
    with pytest.raises(UserError, match="was created with other task files in --decontaminate"):
        build(recipe, out, 1, quiet=True, task_texts=read_task_texts(str(tasks)))
    with pytest.raises(UserError, match="was not created by this command"):
        build(Recipe(path, vocab_size=384, valid_fraction=0.2), out, 1, quiet=True)


def test_held_out_files_may_overlap_tasks_but_not_all_of_the_training_text(tasks, tmp_path, documents):
    dirty = [f"the one {CAT}", f"the two {CAT}"]
    valid = write_lines(tmp_path / "valid.jsonl", dirty)
    recipe = {"vocab_size": 384, "valid_input": valid, "decontaminate": str(tasks)}
    texts = read_task_texts(str(tasks))
    path = write_lines(tmp_path / "a.jsonl", [*documents[:40], *dirty])
    build(Recipe(path, **recipe), str(tmp_path / "out"), 1, quiet=True, task_texts=texts)
    assert sorted(texts_of(tmp_path / "out", "valid")) == dirty
    assert sorted(texts_of(tmp_path / "out", "train")) == sorted(set(documents[:40]))
    path = write_lines(tmp_path / "b.jsonl", dirty)
    with pytest.raises(UserError, match="all documents to train on overlap texts of --decontaminate="):
        build(Recipe(path, **recipe), str(tmp_path / "none"), 1, quiet=True, task_texts=texts)
