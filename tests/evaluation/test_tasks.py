"""Task files in their published formats, metrics, and errors with file and line."""

import json
import os

import numpy as np
import pytest

from dualsm.evaluation.scoring import Item
from dualsm.evaluation.task_formats import TASKS, Question
from dualsm.evaluation.task_metrics import (
    above,
    accuracy_by_group,
    answer_metrics,
    answer_values,
    compute_metrics,
    correctness,
    equal_length_pairs,
    slor,
)
from dualsm.evaluation.tasks import describe_files, load_task, task_files
from dualsm.process.errors import UserError

LABELLED = {"text": ["a cell", "a rock"], "label": ["A", "B"]}
AS_PUBLISHED = [{"text": "a cell", "label": "A"}, {"text": "a rock", "label": "B"}]

FALL = {
    "context": "Al fell.",
    "question": "Why?",
    "answerA": "he slipped",
    "answerB": "he sang",
    "answerC": "he sat",
}
ENDINGS = {"activity_label": "Cooking", "ctx": "A man cooks. He"}

ROWS = {
    "blimp": [{"sentence_good": "It runs.", "sentence_bad": "It run.", "UID": "agreement"}],
    "hellaswag": [
        ENDINGS
        | {"ctx_a": "A man cooks.", "ctx_b": "he", "endings": ["eats [step] it.", "flies."], "label": 0},
        ENDINGS | {"endings": ["eats it.", "flies."], "label": "0"},
    ],
    "arc_easy": [
        {"id": "1", "question": "What lives?", "choices": LABELLED, "answerKey": "A"},
        {"id": "2", "question": {"stem": "What lives?", "choices": AS_PUBLISHED}, "answerKey": "A"},
        {"question": "What lives?", "choices": LABELLED | {"label": ["1", "2"]}, "answerKey": "1"},
    ],
    "openbookqa": [
        {"id": "1", "question_stem": "What lives?", "choices": LABELLED, "answerKey": "A"},
        {"id": "2", "question": {"stem": "What lives?", "choices": AS_PUBLISHED}, "answerKey": "A"},
    ],
    "commonsenseqa": [
        {
            "id": "1",
            "question": "What lives?",
            "choices": LABELLED,
            "answerKey": "A",
            "question_concept": "x",
        },
        {"id": "2", "question": {"stem": "What lives?", "choices": AS_PUBLISHED}, "answerKey": "A"},
    ],
    "piqa": [{"goal": "Boil water", "sol1": "heat it", "sol2": "freeze it", "label": 0}],
    "siqa": [FALL | {"label": "1"}, FALL | {"label": "A"}],
    "mmlu": [{"question": "What lives?", "subject": "biology", "choices": ["a cell", "a rock"], "answer": 0}],
}
ROWS["arc_challenge"] = ROWS["arc_easy"]


def write(folder, name, rows, file="val.jsonl"):
    path = folder / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbered(name, count):
    """Returns different rows of a task."""
    texts = {"blimp": "sentence_good", "piqa": "goal", "siqa": "context", "openbookqa": "question_stem"}
    return [ROWS[name][0] | {texts[name]: f"It is {number}."} for number in range(count)]


def test_every_task_is_covered():
    assert set(ROWS) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_all_forms_of_a_row_are_the_same_question(tmp_path, name):
    write(tmp_path, name, ROWS[name])
    questions = load_task(name, tmp_path)
    assert len(questions) == len(ROWS[name])
    assert len({(question.items, question.gold) for question in questions}) == 1
    assert questions[0].gold == 0
    if name != "blimp":
        assert all(item.completion.startswith(" ") for item in questions[0].items)
        assert len({item.context for item in questions[0].items}) == 1


def test_hellaswag_is_preprocessed_as_in_the_harness(tmp_path):
    write(tmp_path, "hellaswag", ROWS["hellaswag"])
    question = load_task("hellaswag", tmp_path)[0]
    assert question.items[0] == Item("Cooking: A man cooks. He", " eats it.")


def test_labels_in_a_separate_file(tmp_path):
    rows = [{k: v for k, v in ROWS["piqa"][0].items() if k != "label"}] * 2
    write(tmp_path, "piqa", rows)
    (tmp_path / "piqa" / "val-labels.lst").write_text("1\n0\n")
    assert [question.gold for question in load_task("piqa", tmp_path)] == [1, 0]
    (tmp_path / "piqa" / "val-labels.lst").write_text("1\n")
    with pytest.raises(UserError, match=r"val-labels\.lst has 1 labels, but .* has more lines"):
        load_task("piqa", tmp_path)
    (tmp_path / "piqa" / "val-labels.lst").write_text("1\n0\n1\n")
    with pytest.raises(UserError, match=r"val-labels\.lst has 3 labels, but .* has 2 lines"):
        load_task("piqa", tmp_path)


def test_mmlu_csv_is_read(tmp_path):
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "anatomy_test.csv").write_text('"What, exactly, lives?",a,b,c,d,C\n')
    (question,) = load_task("mmlu", tmp_path)
    assert (question.gold, question.group) == (2, "anatomy")
    assert question.items[0].context == "Question: What, exactly, lives?\nAnswer:"


def test_limit_selects_questions_spread_over_the_files(tmp_path):
    (tmp_path / "blimp").mkdir()
    for group in ("agreement", "binding"):
        rows = [{"sentence_good": f"{i}", "sentence_bad": "x", "UID": group} for i in range(10)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "blimp" / f"{group}.jsonl").write_text(lines)
    questions = load_task("blimp", tmp_path, limit=4)
    assert [(q.group, q.items[0].completion) for q in questions] == [
        ("agreement", "0"),
        ("agreement", "5"),
        ("binding", "0"),
        ("binding", "5"),
    ]
    assert len(load_task("blimp", tmp_path, limit=50)) == 20


@pytest.mark.parametrize(
    ("name", "files", "read"),
    [
        ("arc_easy", ["ARC-Easy/ARC-Easy-Train.jsonl", "ARC-Easy/ARC-Easy-Test.jsonl"], 1),
        ("arc_easy", ["ARC-Easy-Dev.jsonl", "ARC-Easy-Train.jsonl"], 0),
        ("hellaswag", ["hellaswag_test.jsonl", "hellaswag_train.jsonl", "hellaswag_val.jsonl"], 2),
        ("commonsenseqa", ["train_rand_split.jsonl", "dev_rand_split.jsonl"], 1),
        ("piqa", ["tests.jsonl", "valid.jsonl"], 1),
    ],
)
def test_split_with_public_answers_is_read(tmp_path, name, files, read):
    for number, file in enumerate(files):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name][:1] * (number + 1)))
    assert len(load_task(name, tmp_path)) == read + 1


@pytest.mark.parametrize(("name", "archive"), [("siqa", "socialiqa"), ("piqa", "physicaliqa")])
def test_archive_names_are_not_split_names(tmp_path, name, archive):
    """As in AI2's archives: `dev` in the folder name does not make `train.jsonl` the dev split."""
    for split, count in (("train", 9), ("dev", 3)):
        rows = [{k: v for k, v in row.items() if k != "label"} for row in numbered(name, count)]
        write(tmp_path, name, rows, f"{archive}-train-dev/{split}.jsonl")
        (tmp_path / name / f"{archive}-train-dev" / f"{split}-labels.lst").write_text("1\n" * count)
    assert len(load_task(name, tmp_path)) == 3


def test_folder_named_after_a_split_is_that_split(tmp_path):
    for folder, count in (("train", 4), ("validation", 2), ("test", 3)):
        write(tmp_path, "piqa", numbered("piqa", count), f"{folder}/part-0.jsonl")
    assert len(load_task("piqa", tmp_path)) == 2


HIDDEN = [
    ".ipynb_checkpoints/val-checkpoint.jsonl", ".val.jsonl", "._val.jsonl", "__MACOSX/._val.jsonl",
    ".git/a/val.jsonl", "val.jsonl~", "#val.jsonl#", ".#val.jsonl", "val.jsonl.bak", ".val.jsonl.swp",
    "~$val.jsonl", "val.jsonl.orig",
]  # fmt: skip


@pytest.mark.parametrize("copy", HIDDEN)
def test_hidden_and_backup_files_are_ignored(tmp_path, copy):
    write(tmp_path, "blimp", numbered("blimp", 3))
    write(tmp_path, "blimp", numbered("blimp", 5), copy)
    assert len(load_task("blimp", tmp_path)) == 3
    assert task_files("blimp", tmp_path) == [tmp_path / "blimp" / "val.jsonl"]


@pytest.mark.parametrize("copy", ["val copy.jsonl", "val (1).jsonl", "old/val.jsonl"])
def test_copies_of_a_file_are_rejected(tmp_path, copy):
    write(tmp_path, "blimp", numbered("blimp", 3))
    write(tmp_path, "blimp", numbered("blimp", 4), copy)  # edited copy
    with pytest.raises(UserError, match=r"3 questions are also in .*; remove one of the two"):
        load_task("blimp", tmp_path)


def test_files_with_extended_rows_of_the_same_questions_are_rejected(tmp_path):
    """As in OpenBookQA's archive, in `Data/Main` and `Data/Additional`."""
    rows = numbered("openbookqa", 3)
    write(tmp_path, "openbookqa", rows, "Data/Main/test.jsonl")
    extended = [row | {"fact1": "cells live", "turkIdAnonymized": "x"} for row in rows]
    write(tmp_path, "openbookqa", extended, "Data/Additional/test_complete.jsonl")
    with pytest.raises(UserError, match=r"Main/test\.jsonl: 3 questions are also in .*test_complete\.jsonl"):
        load_task("openbookqa", tmp_path)


def test_files_with_some_equal_questions_are_not_copies(tmp_path):
    write(tmp_path, "blimp", numbered("blimp", 4), "a.jsonl")
    write(tmp_path, "blimp", [*numbered("blimp", 9)[7:], *numbered("blimp", 2)], "b.jsonl")
    assert len(load_task("blimp", tmp_path)) == 8


def test_files_are_listed_in_one_line(tmp_path):
    for number in range(6):
        write(tmp_path, "blimp", numbered("blimp", 1), f"{number}.jsonl")
    paths = task_files("blimp", tmp_path)
    folder = tmp_path / "blimp"
    assert describe_files(paths[:2]) == f"{folder / '0.jsonl'}, {folder / '1.jsonl'}"
    assert describe_files(paths) == f"6 files, {folder / '0.jsonl'} to 5.jsonl"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_rejected_by_name(tmp_path, encoding):
    write(tmp_path, "blimp", [])
    line = json.dumps(ROWS["blimp"][0]) + "\n"
    (tmp_path / "blimp" / "val.jsonl").write_bytes(line.encode(encoding))
    with pytest.raises(UserError, match=rf"val\.jsonl, line 1: not UTF-8, but {encoding[:6].upper()}"):
        load_task("blimp", tmp_path)


@pytest.mark.parametrize("name", TASKS)
def test_lone_surrogates_are_rejected_with_their_line(tmp_path, name):
    row = json.dumps(ROWS[name][0])
    texts = {"a rock": r"a \ud800", "heat it": r"\udfff", "he sang": r"\ud800 \ud800", "flies.": r"\ud800",
             "It run.": r"a \ud800"}  # fmt: skip
    for text, odd in texts.items():
        row = row.replace(text, odd)
    write(tmp_path, name, ROWS[name][:1])
    with (tmp_path / name / "val.jsonl").open("a") as file:
        file.write(row)
    with pytest.raises(UserError, match=r"val\.jsonl, line 2: .*surrogate"):
        load_task(name, tmp_path)


def test_unusual_values_of_other_fields_are_ignored(tmp_path):
    write(tmp_path, "piqa", [])
    row = json.dumps(ROWS["piqa"][0])[:-1]
    odd = ["1" * 5000, "[" * 5000 + "]" * 5000, '"\t"', r'"\ud800"', "NaN"]
    (tmp_path / "piqa" / "val.jsonl").write_text("".join(f'{row}, "odd": {value}}}\n' for value in odd))
    assert [question.gold for question in load_task("piqa", tmp_path)] == [0] * 5


def test_files_of_other_types_are_ignored(tmp_path):
    write(tmp_path, "arc_easy", ROWS["arc_easy"])
    (tmp_path / "arc_easy" / "val.csv").write_text("the same,as csv\n")
    assert len(load_task("arc_easy", tmp_path)) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not valid JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"question": "x"}', "not in the format of arc_easy"),
        (
            '{"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}',
            "not in the format",
        ),
        (
            '{"question": "x", "choices": {"text": ["a", ""], "label": ["A", "B"]}, "answerKey": "B"}',
            "answer is empty",
        ),
        ('{"question": "x", "choices": 7, "answerKey": "B"}', "not in the format"),
        (
            '{"question": null, "choices": {"text": null, "label": ["A"]}, "answerKey": "A"}',
            "not in the format",
        ),
        (
            '{"question": "x", "choices": {"text": ["a", null], "label": ["A", "B"]}, "answerKey": "A"}',
            "null",
        ),
        (
            '{"question": 7, "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}',
            "7 is not a string",
        ),
        ('{"question": "x", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}', "1 labels"),
        ('{"question": "x", "choices": {"text": "ab", "label": "AB"}, "answerKey": "A"}', "is not a list"),
        ('{"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}', "fewer than two"),
        ("[" * 100_000, "not valid JSON"),
        (b'{"question": "\xff"}', "not UTF-8"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
    write(tmp_path, "arc_easy", ROWS["arc_easy"])
    with (tmp_path / "arc_easy" / "val.jsonl").open("ab") as file:
        file.write(line.encode() if isinstance(line, str) else line)
    with pytest.raises(UserError, match=rf"val\.jsonl, line 4: .*{message}"):
        load_task("arc_easy", tmp_path)


BAD_LABELS = [None, True, 1.5, "", "AB", "x", 7, -1, 10**30, float("nan"), [0], {"a": 0}]


@pytest.mark.parametrize("label", BAD_LABELS, ids=str)
@pytest.mark.parametrize(("name", "key"), [("siqa", "label"), ("mmlu", "answer"), ("piqa", "label")])
def test_labels_without_an_answer_are_rejected(tmp_path, name, key, label):
    write(tmp_path, name, [ROWS[name][0], ROWS[name][0] | {key: label}])
    with pytest.raises(UserError, match=rf"val\.jsonl, line 2: not in the format of {name}"):
        load_task(name, tmp_path)


@pytest.mark.parametrize("name", TASKS)
def test_every_field_that_is_read_is_checked(tmp_path, name):
    unread = {"UID", "id", "subject", "question_concept", "ctx"}
    row = ROWS[name][0]
    for number, key in enumerate(row.keys() - unread):
        for value in (None, 7.5, [["a"]], {"b": None}):
            folder = tmp_path / f"{number}-{type(value).__name__}"
            write(folder, name, [row | {key: value}])
            with pytest.raises(UserError, match=r"val\.jsonl, line 1: "):
                load_task(name, folder)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"q,a,b,c,d,A\nq,a,b,c,A\n", 2, "5 columns"),
        (b'"q\nr",a,b,c,d,A\n\nq,a,b,c,d,E\n', 4, "or one of ABCD"),
        (b'q,a,b,c,d,A\n"q,a,b,c,d,A\n', 2, "not valid CSV"),
        (b"q,a,b,c,d,A\nq,a,b,\xff,d,A\n", 2, "not UTF-8"),
        (b"q,a,b,,d,A\n", 1, "answer is empty"),
        (b"q,a,b," + b"c" * 200_000 + b",d,A\n", 1, "not valid CSV"),
    ],
)
def test_malformed_csv_is_named(tmp_path, content, line, message):
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "anatomy_test.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"anatomy_test\.csv, line {line}: .*{message}"):
        load_task("mmlu", tmp_path)


def test_byte_order_marks_and_blank_lines_are_ignored(tmp_path):
    write(tmp_path, "blimp", [])
    line = json.dumps(ROWS["blimp"][0]).encode()
    (tmp_path / "blimp" / "val.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\n" + line + b"\n\n")
    assert len(load_task("blimp", tmp_path)) == 2


def test_missing_tasks_and_files_are_named(tmp_path):
    with pytest.raises(UserError, match="telepathy"):
        load_task("telepathy", tmp_path)
    with pytest.raises(UserError, match=r"piqa\.jsonl"):
        load_task("piqa", tmp_path)
    write(tmp_path, "piqa", [])
    with pytest.raises(UserError, match="no questions"):
        load_task("piqa", tmp_path)


def test_accuracy_by_each_metric():
    question = Question((Item("c", " short"), Item("c", " a much longer answer")), 1)
    scores, alone = np.array([-10.0, -20.0]), np.array([-1.0, -19.0])
    judgements = compute_metrics([question], answer_values([question], [scores], [alone]))
    assert judgements["acc"].accuracy == 0  # -10 beats -20
    assert judgements["acc_norm"].accuracy == 1  # -10/5 against -20/20
    assert judgements["acc_uncond"].accuracy == 1  # -9 against -1
    assert set(answer_values([question], [scores], None)) == {"acc", "acc_norm"}
    assert all(judgement.ties == 0 for judgement in judgements.values())


@pytest.mark.parametrize("gold", [0, 1])
def test_tie_counts_half_for_any_position_of_the_answer(gold):
    same = Question((Item("", "same"), Item("", "same")), gold)
    values = answer_values([same, same], [np.array([-3.0, -3.0])] * 2, [np.array([-1.0, -1.0])] * 2)
    for judgement in compute_metrics([same, same], values).values():
        assert judgement == (0.5, 0.0, 0.0, 2)


@pytest.mark.parametrize(
    ("values", "right"),
    [
        ([-1.0, -1.0, -1.0, -1.0], 0.25),
        ([-1.0, -1.0, -2.0, -2.0], 0.5),
        ([-2.0, -1.0, -1.0, -1.0], 0.0),
        ([-20.000001, -20.0, -30.0, -30.0], 0.5),  # a float32 rounding error
        ([-20.001, -20.0, -30.0, -30.0], 0.0),
    ],
)
def test_tied_answers_share_the_question(values, right):
    question = Question(tuple(Item("", letter) for letter in "abcd"), 0)
    assert correctness([question], [np.array(values)]).tolist() == [right]


def test_accuracy_of_no_questions_is_undefined():
    assert compute_metrics([], answer_values([], [], None)) == {
        "acc": (None, None, None, 0),
        "acc_norm": (None, None, None, 0),
    }


def test_unconditional_prompt_is_the_prompt_without_the_question(tmp_path):
    """It is the common ending of the prompts of different questions."""
    for name, task in TASKS.items():
        assert (task.neutral is not None) == (task.metric == "acc_uncond")
        if task.neutral is None:
            continue
        row = json.loads(json.dumps(ROWS[name][0]).replace("What lives?", "Who sleeps"))
        write(tmp_path, name, [ROWS[name][0], row])
        first, second = (question.items[0].context for question in load_task(name, tmp_path))
        assert os.path.commonprefix([first[::-1], second[::-1]])[::-1].strip() == task.neutral


def test_standard_error_and_normalised_score():
    questions = [Question((Item("", "a"), Item("", "b")), gold) for gold in [0] * 75 + [1] * 25]
    judged = compute_metrics(questions, {"acc": [np.array([1.0, 0.0])] * 100})["acc"]
    assert judged.accuracy == 0.75
    assert judged.normalised == pytest.approx(50)
    assert judged.stderr == pytest.approx((0.75 * 0.25 / 99) ** 0.5)
    assert compute_metrics(questions[:1], {"acc": [np.array([1.0, 0.0])]})["acc"].stderr is None


def test_accuracy_by_group():
    questions = [Question((Item("", "a"), Item("", "b")), 0, group) for group in "xyx"]
    assert accuracy_by_group(questions, np.array([True, True, False])) == {
        "x": {"score": 0.5, "stderr": 0.5, "n": 2},
        "y": {"score": 1.0, "stderr": None, "n": 1},
    }
    assert accuracy_by_group(questions[:1], np.array([True])) == {}


def test_above_a_floor_is_0_at_the_floor_and_100_for_perfect_answers():
    assert above(0.75, 0.5) == pytest.approx(50)
    assert above(0.75, 0.7) == pytest.approx(100 * 0.05 / 0.3)
    assert above(0.7, 0.7) == above(1.0, 1.0) == 0
    assert above(1.0, 0.7) == pytest.approx(100)
    assert above(0.4, 0.5) < 0


def test_bits_per_byte_of_the_correct_answer():
    """A letter with an accent is two bytes, and the blank before an answer is none."""
    questions = [
        Question((Item("c", " ab"), Item("c", " abcd"), Item("c", " é")), 0),
        Question((Item("c", " abcd"), Item("c", " ab")), 1),
    ]
    bits = [np.array([-4.0, -4.0, -6.0]), np.array([-2.0, -6.0])]
    answer = answer_metrics(questions, [score * np.log(2) for score in bits])
    assert answer.bits_per_byte == pytest.approx((2 + 3) / 2)
    assert answer.bits_per_byte_stderr == pytest.approx(0.5)
    assert answer.margin == pytest.approx(((1 - 2) + (0.5 - 3)) / 2)
    assert answer_metrics([], []) == (None, None, None, None)


def test_slor_ignores_the_frequency_of_words_and_the_length():
    """Both answers are as likely as their words, the second with twice the words."""
    unigram, tokens = [np.array([-10.0, -20.0])], [np.array([5, 10])]
    np.testing.assert_allclose(slor([np.array([-5.0, -10.0])], unigram, tokens), [[1.0, 1.0]])


def test_pairs_of_equal_length_are_a_group():
    tokens = [np.array([3, 3]), np.array([3, 4]), np.array([2, 2])]
    assert equal_length_pairs(tokens, np.array([1.0, 0.0, 0.0])) == {
        "(pairs of equal length)": {"score": 0.5, "stderr": 0.5, "n": 2}
    }
    assert equal_length_pairs(tokens[1:2], np.array([1.0])) == {}
