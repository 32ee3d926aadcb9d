"""The results file of a checkpoint: new results replace old ones of the same task and mode."""

import json

import pytest

from dualsm.evaluation.spec import EvalSpec
from dualsm.process.errors import UserError
from dualsm.rundir.results import merge, read_results


def results(step=12, **parts) -> dict:
    return {"workdir": "run", "checkpoint": step, "tasks": {}} | parts


def test_results_are_replaced_by_task_mode_and_objective():
    old = results(
        tasks={"blimp": {"causal": {"score": 1}, "masked": {"score": 2}}, "piqa": {"causal": {"score": 3}}},
        held_out={"causal": {"n": 4}, "prefix": {"n": 5}},
    )
    new = results(
        tasks={"blimp": {"masked": {"score": 6}, "prefix": {"score": 7}}}, held_out={"prefix": {"n": 8}}
    )
    assert merge(old, new) == results(
        tasks={
            "blimp": {"causal": {"score": 1}, "masked": {"score": 6}, "prefix": {"score": 7}},
            "piqa": {"causal": {"score": 3}},
        },
        held_out={"causal": {"n": 4}, "prefix": {"n": 8}},
    )
    assert old["tasks"]["blimp"]["masked"] == {"score": 2}


def test_first_results_are_unchanged(tmp_path):
    new = results(tasks={"blimp": {"causal": {"score": 1}}})
    assert json.dumps(merge(read_results(tmp_path / "none.json"), new)) == json.dumps(new)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", b"\xff", '{"tasks": 3}', '{"tasks": {"blimp": 3}}', '{"held_out": {"causal": 3}}'],
)
def test_damaged_results_are_a_user_error(tmp_path, content):
    path = tmp_path / "step_12.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"step_12.json is not a results file of dualsm.evaluate"):
        read_results(path)


@pytest.mark.parametrize(
    ("tasks", "modes", "text"),
    [
        ([], ["causal"], "--tasks="),
        (["valid"], [], "--modes="),
        (["valid"], ["telepathy"], "'telepathy'"),
        (["telepathy"], ["causal"], "'telepathy'"),
        (["blimp"], ["causal"], "--task_data"),
    ],
)
def test_invalid_requests_are_rejected(tasks, modes, text):
    with pytest.raises(UserError, match=text):
        EvalSpec(tasks, modes).check()
    with pytest.raises(UserError, match="--draft=99"):
        EvalSpec(["valid"], ["causal"], draft=99).check()
