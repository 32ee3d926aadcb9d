"""What `dualsm.recommend` answers, by which source, and how it says that it cannot."""

import json

import pytest

from dualsm.analysis import answer
from dualsm.analysis.advice import Stopping, advise_by_table
from dualsm.analysis.table import load, write_table
from dualsm.errors import UserError
from tests.analysis.synthetic import BUDGET, STEPS, grid, write_cell, write_plan, write_sweep
from tests.conftest import run_command

LOSS = "valid/causal/loss"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep of the synthetic losses, and on the data of R = 128 causal runs that stop early."""
    folder = tmp_path_factory.mktemp("sweep")
    shorter = [
        {"repetitions": r, "alpha": 1.0, "steps": STEPS * r // 128, "optimizer.learning_rate": 0.02}
        for r in (16, 32)
    ]
    cells = grid([1, 16, 64, 128], [0, 1 / 64, 1 / 8, 1 / 2, 7 / 8, 1])
    write_sweep(folder, cells)
    names = {write_cell(folder, values, steps=values["steps"]): values for values in shorter}
    plan = {path.name: {} for path in sorted((folder / "cells").iterdir())} | names
    write_plan(folder, plan)
    return folder


@pytest.fixture(scope="module")
def table(sweep, tmp_path_factory):
    """The sweep's table, which is read faster than its folder."""
    path = tmp_path_factory.mktemp("table") / "t.csv"
    write_table(path, load(sweep))
    return path


def ask(*arguments, unique=BUDGET // 128, budget=BUDGET):
    return run_command("dualsm.recommend", f"--unique_tokens={unique}", f"--budget={budget}", *arguments)


def words(table, unique, budget):
    """What the command prints, without a process of its own."""
    return answer.describe(answer.advise(max(budget / unique, 1), table), unique, budget, str(table))


def fail_with(*texts, **options):
    arguments = options.pop("arguments", [])
    process = ask(*arguments, **options)
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith("error: ")
    for text in texts:
        assert text in process.stderr


def test_by_a_sweep_of_ones_own(sweep, tmp_path):
    process = ask(f"--sweep={sweep}", f"--output={tmp_path / 'new' / 'a.json'}")
    assert process.returncode == 0, process.stderr
    answer = json.loads((tmp_path / "new" / "a.json").read_text())
    assert answer["source"] == "surface"
    assert answer["repetitions"] == 128
    assert answer["table"]["cells"] == 24  # without the shorter ones
    assert 1 / 64 <= answer["alpha"] <= 1 / 4
    assert answer["octaves_outside"] == 0
    assert answer["surface"]["gain_over_causal"]["mean"] > 0.5
    assert answer["stopping"]["shorter"]["repetitions"] in (16, 32)
    printed = " ".join(process.stdout.split())
    for text in (
        str(sweep), "seen 128 times", f"--config.mixture.causal={answer['alpha']:.6g}", "80% sure",
        "--config.repetitions=128", f"{LOSS} (lower is better)", "lies inside", "stop instead",
    ):  # fmt: skip
        assert text in printed, text


def test_a_folder_for_the_answer_is_refused_before_it_is_sought(tmp_path):
    fail_with("--output=", "is a folder", arguments=[f"--output={tmp_path}/", "--sweep=nowhere"])
    assert not list(tmp_path.parent.glob(f"*{tmp_path.name}.*"))


def test_a_table_answers_as_its_sweep(sweep, table):
    assert answer.advise(50, table) == answer.advise(50, sweep)


def test_far_and_few_are_said(table, tmp_path):
    warning = "warning: 1 to 128 repetitions were tried; the question lies 3.0 doublings outside"
    assert warning in words(table, 1024, BUDGET)
    rows = [row for row in load(table) if row["repetitions"] == 64][:5]
    write_table(tmp_path / "few.csv", rows)
    warning = "warning: too few cells for a surface to be trusted (5 cells"
    assert warning in words(tmp_path / "few.csv", 1024, BUDGET)


def test_by_the_papers_rules_without_a_table(monkeypatch, tmp_path):
    monkeypatch.setattr(answer, "SHIPPED", tmp_path / "none.csv")
    advice = answer.advise(128)
    assert (advice.source, advice.alpha, advice.octaves_outside) == ("rules", 1 / 8, 0)
    text = answer.describe(advice, 1e6, 1.28e8, "")
    assert "arXiv 2512.14549" in text
    assert "causal 1/8, masked_diffusion 7/8" in text
    far = answer.describe(answer.advise(1024), 1, 1024, "")
    assert "1 to 256 repetitions were tried; the question lies 2.0 doublings outside" in far
    with pytest.raises(UserError, match="--sweep"):
        answer.advise(4, metric=LOSS)


def test_by_the_shipped_table_where_there_is_one(monkeypatch, sweep, tmp_path):
    shipped = tmp_path / "shipped.csv"
    write_table(shipped, load(sweep))
    monkeypatch.setattr(answer, "SHIPPED", shipped)
    advice = answer.advise(64)
    assert advice == answer.advise(64, sweep)
    text = answer.describe(advice, 1, 64, "")
    assert "the table that comes with dualsm" in text
    assert "from 470M parameters, say: causal 1/4" in text
    monkeypatch.setattr(answer, "find_spec", lambda name: None)  # no scikit-learn
    advice = answer.advise(64)
    assert (advice.source, advice.alpha) == ("rules", 1 / 4)
    assert "pip install 'dualsm[analysis]'" in answer.describe(advice, 1, 64, "")


def test_the_table_that_comes_with_it():
    """Causal rows where nothing repeats, few of them at 128 repetitions, and the option to stop."""
    once, often = answer.advise(1), answer.advise(128)
    assert once.source == often.source == "surface"
    assert once.alpha > 0.9
    assert 1 / 32 <= often.alpha <= 1 / 2
    assert often.stopping.verdict == "stop early"
    assert 16 <= often.stopping.shorter.repetitions < 128
    found_best = {"optimizer.weight_decay": 1.0, "optimizer.learning_rate": 0.02}
    assert often.stopping.shorter.setting == found_best
    assert often.stopping.mixed.score < often.stopping.full.score
    assert once.surface.few_cells == ""


def test_enough_text_does_not_repeat(table, tmp_path):
    path = tmp_path / "a.json"
    process = ask(f"--sweep={table}", f"--output={path}", unique=2 * BUDGET)
    assert "nothing repeats" in process.stdout
    assert "stop instead" not in process.stdout
    assert json.loads(path.read_text())["repetitions"] == 1


def test_repetitions_of_the_config_are_enough(table):
    """R = D / N need not be whole; with fewer repetitions the run would need more text than there is."""
    text = words(table, 1000, 2500)
    assert "seen 2.5 times" in text
    assert "--config.repetitions=3\n" in text
    assert "--config.repetitions=4\n" in words(table, 1000, 4000)


ERRORS = {
    "no flags for it": (["--sweep=nowhere"], {}, ["nowhere"]),
    "no text": ([], {"unique": 0}, ["--unique_tokens"]),
    "a word": ([], {"unique": "much"}, ["--unique_tokens"]),
    "not finite": ([], {"budget": "inf"}, ["--budget", "finite"]),
    "no such metric": (["--sweep={table}", "--metric=speed"], {}, ["speed", "there are", LOSS]),
    "no place for the output": (
        ["--sweep={table}", "--output={table}/a.json"],
        {},
        ["--output: cannot make the folder"],
    ),
    "no sweep there": (["--sweep={sweep}/cells"], {}, ["no sweep at", "sweep.json"]),
    "no table": (["--sweep={sweep}/sweep.json"], {}, ["no column"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_in_one_line(case, sweep, table):
    arguments, question, texts = ERRORS[case]
    fail_with(
        *texts, arguments=[argument.format(sweep=sweep, table=table) for argument in arguments], **question
    )


def stopping(shorter_loss, **options) -> Stopping | None:
    """The verdict of a small table whose best cell at R = 128 has a loss of 3.0, noise some 0.01."""
    options = {"repetitions": 128, "shorter_alpha": 1, "metric": LOSS} | options
    sign = 1 if options["metric"] == LOSS else -1
    rows = []
    for seed, noise in enumerate((-0.007, 0.007)):
        for repetitions in (32, 128):
            for alpha, loss in ((0, 4.0), (0.125, 3.0), (0.5, 3.5), (1, 5.0)):
                rows.append((repetitions, alpha, seed, 1024, sign * (loss + noise)))
        rows.append((16, options["shorter_alpha"], seed, 128, sign * (shorter_loss + noise)))
        if "mixed_loss" in options:
            rows.append((16, 0.5, seed, 128, sign * (options["mixed_loss"] + noise)))
        rows.append((2, 1, seed, 128, sign * 1.0))  # other unique tokens
    names = ("repetitions", "alpha", "seed", "budget_tokens", options["metric"])
    table = [dict(zip(names, row, strict=True)) | {"name": "x", "status": "done"} for row in rows]
    for row in table:
        row |= {"steps": row["budget_tokens"] // 8, "rate": 0.1 if row["budget_tokens"] == 128 else None}
    return advise_by_table(table, options["metric"], options["repetitions"]).stopping


@pytest.mark.parametrize("metric", [LOSS, "task/mean/prefix"])
@pytest.mark.parametrize(
    ("loss", "verdict"),
    [(2.5, "stop early"), (3.005, "no clear difference"), (3.5, "full mixture")],
)
def test_stopping_early_is_recommended_when_it_is_better(loss, verdict, metric):
    found = stopping(loss, metric=metric)
    assert found.verdict == verdict
    assert found.gain.mean == pytest.approx(3.0 - loss)
    assert found.gain.sd > 0
    assert (found.full.repetitions, found.full.alpha, found.full.runs) == (128, 0.125, 2)
    assert (found.shorter.repetitions, found.shorter.budget_tokens) == (16, 128)
    assert found.unique_tokens == 8


def test_mixtures_that_stop_are_told_of():
    assert stopping(2.5).mixed is None
    both = stopping(2.5, mixed_loss=2.6)
    assert (both.shorter.alpha, both.mixed.alpha, both.mixed.score) == (1, 0.5, pytest.approx(2.6))
    assert "a mixture that stops: causal 1/2, 16 repetitions" in "\n".join(answer._stopping(both, LOSS))


def test_stopping_is_told_of_only_where_cells_tell_it():
    assert stopping(2.5, repetitions=100).shorter.repetitions == 16
    assert stopping(2.5, repetitions=20) is None  # R = 32 is near, but has no shorter runs
    assert stopping(2.5, shorter_alpha=0.5) is None  # no causal one


@pytest.mark.parametrize(
    ("loss", "expected"), [(2.5, "stop instead: shorter"), (3.005, "as well, for less"), (3.5, "no: shorter")]
)
def test_stopping_in_words(loss, expected):
    found = stopping(loss)
    text = "\n".join(answer._stopping(found, LOSS))
    assert expected in text
    assert "16 repetitions, 128 tokens, rate=0.1: " in text
    assert "128 repetitions, 1,024 tokens: 3" in text
    assert "mean of 2 seeds" in text
