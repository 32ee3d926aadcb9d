"""Task files in their published formats, judging, and faults with file and line."""

import json

import numpy as np
import pytest

from dualsm.errors import UserError
from dualsm.evaluation.scoring import Item
from dualsm.evaluation.tasks import TASKS, Question, judge, load_task

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


def write(folder, name, rows):
    (folder / name).mkdir(parents=True)
    (folder / name / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_task_has_rows_here():
    assert set(ROWS) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_all_forms_of_a_row_mean_the_same_question(tmp_path, name):
    write(tmp_path, name, ROWS[name])
    questions = load_task(name, tmp_path)
    assert len(questions) == len(ROWS[name])
    assert len({(question.items, question.gold) for question in questions}) == 1
    assert questions[0].gold == 0
    if name != "blimp":
        assert all(item.completion.startswith(" ") for item in questions[0].items)
        assert len({item.context for item in questions[0].items}) == 1


def test_hellaswag_is_read_as_the_field_reads_it(tmp_path):
    write(tmp_path, "hellaswag", ROWS["hellaswag"])
    question = load_task("hellaswag", tmp_path)[0]
    assert question.items[0] == Item("Cooking: A man cooks. He", " eats it.")


def test_labels_in_a_file_beside(tmp_path):
    rows = [{k: v for k, v in ROWS["piqa"][0].items() if k != "label"}] * 2
    write(tmp_path, "piqa", rows)
    (tmp_path / "piqa" / "val-labels.lst").write_text("1\n0\n")
    assert [question.gold for question in load_task("piqa", tmp_path)] == [1, 0]
    (tmp_path / "piqa" / "val-labels.lst").write_text("1\n")
    with pytest.raises(UserError, match=r"val-labels\.lst ends before line 2"):
        load_task("piqa", tmp_path)


def test_mmlu_as_csv(tmp_path):
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "anatomy_test.csv").write_text('"What, exactly, lives?",a,b,c,d,C\n')
    (question,) = load_task("mmlu", tmp_path)
    assert (question.gold, question.group) == (2, "anatomy")
    assert question.items[0].context == "Question: What, exactly, lives?\nAnswer:"


def test_a_limit_bounds_the_questions(tmp_path):
    write(tmp_path, "blimp", ROWS["blimp"] * 10)
    assert len(load_task("blimp", tmp_path, limit=3)) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "no JSON"),
        ("[1, 2]", "no JSON object"),
        ('{"question": "x"}', "not in the format of arc_easy"),
        (
            '{"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}',
            "not in the format",
        ),
        (
            '{"question": "x", "choices": {"text": ["a", ""], "label": ["A", "B"]}, "answerKey": "B"}',
            "empty answer",
        ),
        ('{"question": "x", "choices": 7, "answerKey": "B"}', "not in the format"),
        (
            '{"question": null, "choices": {"text": null, "label": ["A"]}, "answerKey": "A"}',
            "not in the format",
        ),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
    write(tmp_path, "arc_easy", ROWS["arc_easy"])
    with (tmp_path / "arc_easy" / "val.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=rf"val\.jsonl, line 4: .*{message}"):
        load_task("arc_easy", tmp_path)


def test_missing_tasks_and_files_are_named(tmp_path):
    with pytest.raises(UserError, match="telepathy"):
        load_task("telepathy", tmp_path)
    with pytest.raises(UserError, match=r"piqa\.jsonl"):
        load_task("piqa", tmp_path)
    write(tmp_path, "piqa", [])
    with pytest.raises(UserError, match="no questions"):
        load_task("piqa", tmp_path)


def test_judging_by_each_metric():
    question = Question((Item("c", " short"), Item("c", " a much longer answer")), 1)
    scores, alone = np.array([-10.0, -20.0]), np.array([-1.0, -19.0])
    judgements = judge([question], [scores], [alone])
    assert judgements["acc"].accuracy == 0  # -10 beats -20
    assert judgements["acc_norm"].accuracy == 1  # -10/5 against -20/20
    assert judgements["acc_uncond"].accuracy == 1  # -9 against -1
    assert set(judge([question], [scores], None)) == {"acc", "acc_norm"}


def test_standard_error_and_normalised_score():
    questions = [Question((Item("", "a"), Item("", "b")), gold) for gold in [0] * 75 + [1] * 25]
    judged = judge(questions, [np.array([1.0, 0.0])] * 100, None)["acc"]
    assert judged.accuracy == 0.75
    assert judged.normalised == pytest.approx(50)
    assert judged.stderr == pytest.approx((0.75 * 0.25 / 99) ** 0.5)
