"""Results as lm-evaluation-harness writes them: the layout by itself, and in the harness's own readers."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from dualsm.evaluation.harness_results import layout, results_path
from dualsm.evaluation.judging import evaluate_task
from dualsm.evaluation.modes import Scoring
from dualsm.evaluation.scoring import Item
from dualsm.evaluation.tasks import Question

NEEDS_LM_EVAL = "needs lm_eval: pip install 'dualsm[eval]'"
BLIMP = [
    Question((Item("", "good"), Item("", "bad")), 0, group) for group in ("island", "island", "island", "npi")
]
PIQA = [Question((Item("Question: a\nAnswer:", " x"), Item("Question: a\nAnswer:", " yy")), 1)] * 2


def results(modes=("causal", "masked")) -> dict:
    """What `dualsm.evaluate` writes. The first answer wins, but for one question in the mode masked."""

    def scorer(items, scoring, label):
        scores = np.zeros(len(items))
        scores[::2] = 1.0
        if label == "blimp, masked":
            scores[:2] = 0.0, 1.0  # one wrong answer
        return SimpleNamespace(log_likelihood_N=scores, cut_N=scores > 2)

    tasks = {"blimp": BLIMP, "piqa": PIQA}
    return {
        "workdir": "runs/small",
        "checkpoint": 40,
        "tasks": {
            name: {mode: evaluate_task(name, asked, scorer, Scoring(mode, (1, 4))) for mode in modes}
            for name, asked in tasks.items()
        },
    }


def converted(mode: str, held_out=None) -> dict:
    everything = {"blimp": BLIMP * 10, "piqa": PIQA}  # a run with --limit
    config = {"limit": 4}
    made = layout(results(), mode, everything, held_out, config, started=86400.0, seconds=2.5)
    return json.loads(json.dumps(made, allow_nan=False))


def test_scores_stand_where_the_harness_has_them():
    made = converted("masked")
    assert made["results"]["blimp"] == {
        "name": "blimp", "alias": "blimp", "sample_len": 4,
        "acc,none": 0.75, "acc_stderr,none": pytest.approx(0.25),
        "acc_norm,none": 0.75, "acc_norm_stderr,none": pytest.approx(0.25),
    }  # fmt: skip
    assert made["results"]["piqa"]["acc,none"] == 0.0
    assert "acc_uncond,none" not in made["results"]["piqa"]  # nobody asks for it there
    assert made["n-samples"]["blimp"] == {"original": 40, "effective": 4}
    assert made["n-samples"]["blimp_island"] == {"original": 30, "effective": 3}
    assert made["config"]["limit"] == 4
    assert made["config"]["model_args"] == {
        "workdir": "runs/small", "checkpoint": 40, "mode": "masked", "masks": [1, 4],
    }  # fmt: skip


def test_paradigms_are_tasks_of_a_group():
    made = converted("masked")
    assert made["group_subtasks"] == {"blimp": ["blimp_island", "blimp_npi"]}
    assert made["groups"] == {"blimp": made["results"]["blimp"]}
    island, npi = made["results"]["blimp_island"], made["results"]["blimp_npi"]
    assert island["acc,none"] == pytest.approx(2 / 3)
    right = np.array([0, 1, 1])
    assert island["acc_stderr,none"] == pytest.approx(right.std(ddof=1) / math.sqrt(3))
    assert npi["acc_stderr,none"] == "N/A"  # of one question


def test_every_mode_is_a_model_with_a_file_of_its_own(tmp_path):
    causal, masked = converted("causal"), converted("masked")
    assert causal["results"]["blimp"]["acc,none"] == 1.0
    assert (causal["model_name"], masked["model_name"]) == ("small-40-causal", "small-40-masked")
    path = results_path(tmp_path, masked)
    assert path.parent == tmp_path / "small-40-masked"
    assert path.name.startswith("results_1970-01-0")
    assert ":" not in path.name


def test_held_out_text_is_a_task_where_less_is_better():
    made = converted("causal", {"nats_per_token": 3.0, "bits_per_byte": 1.5, "n": 7})
    valid = made["results"]["valid"]
    assert valid["bits_per_byte,none"] == 1.5
    assert valid["byte_perplexity,none"] == pytest.approx(2**1.5)
    assert made["higher_is_better"]["valid"] == {"bits_per_byte": False, "byte_perplexity": False}
    assert "valid" not in converted("causal")["results"]


def test_every_task_is_described():
    made = converted("causal", {"bits_per_byte": 1.5, "n": 7})
    for part in ("configs", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert made[part].keys() == made["results"].keys()


@pytest.mark.extras
def test_the_harness_knows_every_key():
    schema = pytest.importorskip("lm_eval.result_schema", reason=NEEDS_LM_EVAL)
    made = converted("masked", {"bits_per_byte": 1.5, "n": 7})
    assert made.keys() <= schema.EvalResults.__annotations__.keys()
    for entry in made["results"].values():
        assert {"name", "alias", "sample_len"} <= entry.keys()


@pytest.mark.extras
def test_the_harness_prints_its_table():
    utils = pytest.importorskip("lm_eval.utils", reason=NEEDS_LM_EVAL)
    made = converted("masked")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in utils.make_table(made).splitlines()[2:]
    ]
    shown = {(row[0], row[4]): (row[6], row[8]) for row in rows}
    assert shown["blimp", "acc"] == ("0.7500", "0.2500")
    assert shown["- blimp_island", "acc"] == ("0.6667", "0.3333")
    assert shown["- blimp_npi", "acc"] == ("1.0000", "N/A")
    assert "blimp" in utils.make_table(made, "groups")


@pytest.mark.extras
def test_the_harness_sends_them_to_its_boards():
    loggers = pytest.importorskip("lm_eval.loggers.wandb_logger", reason=NEEDS_LM_EVAL)
    logger = loggers.WandbLogger.__new__(loggers.WandbLogger)  # its constructor would go online
    logger.post_init(converted("masked"))
    assert logger.group_names == ["blimp"]
    summary, numbers = logger._sanitize_results_dict()
    assert numbers["blimp/acc"] == 0.75
    assert summary["blimp_npi/acc_stderr"] == "N/A"
    assert logger._get_config()["cli_configs"]["model"] == "dualsm"
