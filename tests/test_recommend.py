"""`dualsm.recommend`: answers of each source, their text, and error messages."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from dualsm.analysis import advice
from dualsm.analysis.advice import (
    SHIPPED,
    advise,
    advise_by_rules,
    advise_by_table,
    parse_sources,
    round_repetitions,
)
from dualsm.analysis.advice_text import describe
from dualsm.analysis.confirmed import answer, describe_confirmed
from dualsm.analysis.sizes import read_sizes
from dualsm.analysis.table import load, make_table, read_table, write_table
from dualsm.config import add_source, check_config
from dualsm.process.errors import UserError
from dualsm.sweeps.grid import parse_value
from tests.analysis.synthetic import BUDGET, STEPS, grid, write_cell, write_plan, write_sweep
from tests.conftest import run_command
from tests.micro import micro_config

pytestmark = pytest.mark.slow

LOSS = "valid/causal/loss"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Writes a sweep with synthetic losses, and shorter causal runs on the unique tokens of R = 128."""
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
    """Writes the table of the sweep, which is faster to read than its folder."""
    path = tmp_path_factory.mktemp("table") / "t.csv"
    write_table(path, load(sweep))
    return path


def ask(*arguments, unique=BUDGET // 128, budget=BUDGET):
    return run_command("dualsm.recommend", f"--unique_tokens={unique}", f"--budget={budget}", *arguments)


def answer_text(table, unique, budget):
    """Returns the text that the command prints, without starting a process."""
    question = round_repetitions(unique, budget)
    return describe(question, advise(question.repetitions, table), str(table))


def flags(text):
    """Parses the printed flags into one dict per source."""
    pairs = re.findall(r"--config\.(?:mixture\.)?(\w+)=(\S+)", text)
    return [dict(pairs[i : i + 4]) for i in range(0, len(pairs), 4)]


def fail_with(*texts, **options):
    arguments = options.pop("arguments", [])
    process = ask(*arguments, **options)
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith("error: ")
    for text in texts:
        assert text in process.stderr


def test_answers_from_a_sweep_come_first(sweep, tmp_path):
    process = ask(f"--sweep={sweep}", f"--output={tmp_path / 'new' / 'a.json'}")
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "new" / "a.json").read_text())
    assert found["source"] == "surface"
    assert found["repetitions"] == 128
    assert found["table"]["cells"] == 24  # the shorter runs are excluded
    assert 1 / 64 <= found["alpha"] <= 1 / 4
    assert found["doublings_outside"] == 0
    assert found["surface"]["gain_over_causal"]["mean"] > 0.5
    assert found["stopping"]["verdict"] == "unknown"  # each cell has one seed
    assert found["measured"]["0.125"][1] == 1
    (by_rules,) = found["others"]
    assert (by_rules["source"], by_rules["alpha"]) == ("rules", 1 / 8)
    printed = " ".join(process.stdout.split())
    for text in (
        str(sweep), "128 passes", f"--config.mixture.causal={found['alpha']:.6g}", "80% credible interval",
        "--config.repetitions=128", f"{LOSS} (lower is better)", "is inside this range",
        "stop earlier? unknown: ", "by the rules of", "models of 470,000,000 parameters",
        "are left out: --sweep answers from your own runs",
    ):  # fmt: skip
        assert text in printed, text
    assert "confirmed" not in found


def test_output_that_is_a_folder_raises_before_the_sweep_is_read(tmp_path):
    fail_with("--output=", "is a folder", arguments=[f"--output={tmp_path}/", "--sweep=nowhere"])
    assert not list(tmp_path.parent.glob(f"*{tmp_path.name}.*"))


def test_a_table_gives_the_same_answer_as_its_sweep(sweep, table):
    assert advise(64, table) == advise(64, sweep)


def test_extrapolation_and_few_cells_are_warned_about(table, tmp_path):
    warning = "warning: 1 to 128 repetitions were tried; R = 1024 is 3.0 doublings outside this range"
    assert warning in answer_text(table, 1024, BUDGET)
    cells = load(table).query("repetitions == 64")[:5]
    write_table(tmp_path / "few.csv", cells)
    warning = "warning: too few cells for a reliable surface (5 cells"
    assert warning in answer_text(tmp_path / "few.csv", 1024, BUDGET)


def test_the_rules_come_first_with_and_without_scikit_learn(monkeypatch):
    """The extra adds a second answer and does not change the first one."""
    question = round_repetitions(1e6, 6.4e7)
    both = advise(64)
    text = describe(question, both, "")
    assert [found.source for found in both] == ["rules", "surface"]
    assert [found.alpha for found in both] == [1 / 4, 1 / 2]
    for expected in (
        "arXiv 2512.14549", "models of 470,000,000 parameters", "the table that comes with dualsm",
        "models of 230,336 parameters", "the answers differ: each is valid for the model size",
    ):  # fmt: skip
        assert expected in text
    assert [found["causal"] for found in flags(text)] == ["0.25", "0.5"]
    monkeypatch.setattr(advice, "find_spec", lambda name: None)  # simulates missing packages
    (alone,) = advise(64)
    assert alone == both[0]
    text = describe(question, [alone], "")
    assert "table of small models that comes with dualsm needs pandas and scikit-learn: pip install" in text
    assert "causal 1/4, masked_diffusion 3/4" in text
    far = describe(round_repetitions(1, 1024), advise(1024), "")
    assert "1 to 256 repetitions were tried; R = 1024 is 2.0 doublings outside this range" in far
    with pytest.raises(UserError, match="needs pandas and scikit-learn"):
        advise(4, metric=LOSS)


@pytest.fixture(scope="module")
def shipped():
    """Returns R -> answer of the table that comes with dualsm."""
    return {r: advise(r)[1] for r in (1, 64, 128)}


def test_answers_of_the_shipped_table(shipped):
    """Mostly causal rows without repetition, few causal rows at 128 repetitions."""
    assert shipped[1].alpha > 0.9
    assert 1 / 32 <= shipped[128].alpha <= 1 / 2
    assert shipped[1].surface.few_cells == ""
    assert shipped[1].stopping is None
    assert load(SHIPPED).filter(like="optimizer.").notna().all(axis=None)
    assert shipped[128].table["unequally_tuned"] == []


def test_stopping_is_unknown_where_the_shipped_table_lacks_runs(shipped):
    """R = 64 has no shorter runs; at R = 128 only the shorter runs were tuned."""
    assert shipped[64].stopping.verdict == "unknown"
    assert "no shorter causal run has the same 235,520 unique tokens" in shipped[64].stopping.reason
    often = shipped[128].stopping
    assert often.verdict == "unknown"
    best = {"optimizer.weight_decay": 1.0, "optimizer.learning_rate": 0.02}
    assert (often.shorter.setting, often.shorter.runs) == (best, 2)
    assert often.full.setting == {"optimizer.weight_decay": 0.1, "optimizer.learning_rate": 0.01}


def test_a_clipped_loss_is_printed_as_a_bound(shipped):
    """At R = 128, alpha = 1 and 1/4 differ by 3.26; the surface resolves up to ln 20 above the best."""
    gain = shipped[128].surface.gain_over_causal
    assert gain.at_least
    assert gain.mean < 3.26
    text = describe(round_repetitions(1, 128), [shipped[128]], "")
    assert f"better than causal rows only by at least {gain.mean:.2f}\n" in text
    cells = "causal 0: 4.407, causal 1/4: 3.249 (mean of 2 seeds), causal 1: 6.507"
    assert f"measured at R = 128: {cells}\n" in text


def test_unequal_tuning_is_warned_about(table):
    cells = read_table(table)
    extra = cells.query("repetitions == 64 and alpha == 0.5").assign(**{"optimizer.learning_rate": 0.5})
    advice = advise_by_table(make_table(pd.concat([cells, extra])), LOSS, 64)
    text = describe(round_repetitions(1, 64), [advice], "x")
    assert "warning: at R = 64 some alphas were tuned with more settings than others" in text


def test_an_interval_of_all_tried_shares_is_warned_about(table):
    """The scores are noise, so that any share may be the best."""
    cells, warning = read_table(table), "warning: the interval is the whole range that was tried"
    noise = cells.assign(**{LOSS: 3 + 0.1 * np.random.default_rng(0).standard_normal(len(cells))})
    for scores, warned in ((noise, True), (cells, False)):
        text = describe(round_repetitions(1, 64), [advise_by_table(scores, LOSS, 64)], "x")
        assert (warning in text) == warned


def test_many_repetitions_are_not_rounded(table):
    (found, *_) = flags(answer_text(table, 1, 1_234_567))
    assert found["repetitions"] == "1234567"


def test_a_range_of_model_sizes_is_printed(table):
    cells = read_table(table)
    cells.loc[0, "parameters"] *= 3
    advice = advise_by_table(cells, LOSS, 64)
    low, high = sorted(cells.query(f"budget_tokens == {BUDGET}")["parameters"].unique())
    assert f"models of {low:,.0f} to {high:,.0f} parameters" in describe(
        round_repetitions(1, 64), [advice], "x"
    )


def test_a_budget_below_the_corpus_size_needs_no_repetition(table, tmp_path):
    path = tmp_path / "a.json"
    process = ask(f"--sweep={table}", f"--output={path}", unique=2 * BUDGET)
    assert "nothing repeats" in process.stdout
    assert "stop earlier" not in process.stdout
    assert json.loads(path.read_text())["repetitions"] == 1


@pytest.mark.parametrize(
    ("budget", "repetitions", "seen_unique", "seen", "text"),
    [
        (1010, 1, 1000, 1000, "with R = 1, train on 1,000 tokens, 0.99% fewer"),
        (2400, 2, 1000, 2000, "with R = 2, train on 2,000 tokens, 16.67% fewer"),
        (2500, 3, 2500 / 3, 2500, "with R = 3, the run sees the first 833 unique tokens; to see all of them "
         "3 times, train on 3,000"),
        (3999, 4, 3999 / 4, 3999, "with R = 4, the run sees the first 1,000 unique tokens"),
        (4000, 4, 1000, 4000, ""),
        (600, 1, 600, 600, ""),
    ],
)  # fmt: skip
def test_repetitions_are_rounded_with_the_smallest_loss_of_data(budget, repetitions, seen_unique, seen, text):
    """1.01 passes become one pass over the corpus, not two passes over half of it."""
    question = round_repetitions(1000, budget)
    assert question.repetitions == repetitions
    assert (question.seen_unique_tokens, question.seen_tokens) == pytest.approx((seen_unique, seen))
    words = describe(question, [advise_by_rules(question.repetitions)], "")
    assert text in words
    assert text or "whole number" not in words
    (found,) = flags(words)
    assert found["repetitions"] == str(repetitions)


def test_each_source_has_its_own_answer(table, tmp_path):
    """The flags of all sources fit a config with these sources; each answer is that of its source alone."""
    path = tmp_path / "a.json"
    sources = {"small": (BUDGET / 64, BUDGET / 4), "large": (3 * BUDGET / 4, 3 * BUDGET / 4)}
    process = run_command(
        "dualsm.recommend", *(f"--source={name}:{u:.0f}:{b:.0f}" for name, (u, b) in sources.items()),
        f"--sweep={table}", f"--output={path}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    answers = json.loads(path.read_text())["sources"]
    assert {name: found["repetitions"] for name, found in answers.items()} == {"small": 16, "large": 1}
    for found in answers.values():
        (alone, _) = advise(found["repetitions"], table)
        assert found["alpha"] == alone.alpha
    first, second = process.stdout.split("source large, share 0.75:")
    assert "source small, share 0.25:" in first
    config = micro_config()
    for name in sources:
        add_source(config, name, "corpus", repetitions=1)
    for text, name in ((first, "small"), (second, "large")):
        line = next(line for line in text.splitlines() if "--config." in line)
        found = re.findall(r"--config\.(\S+)=(\S+)", line)
        config.update_from_flattened_dict({key: parse_value(value) for key, value in found})
        assert f"--config.sources.{name}.repetitions={answers[name]['repetitions']} " in line
    check_config(config)
    assert config.sources.small.share == 0.25
    assert config.sources.small.mixture.causal == pytest.approx(answers["small"]["alpha"], rel=1e-5)
    assert "each answer is that of a run on this source alone" in second


CONFIRMED = "by the confirmed runs that come with dualsm"
UNKNOWN_SIZE = "size not given: set --parameters"
ROLES = ("mixture", "causal", "causal_stop", "second_mode")


def run(tmp_path, *arguments):
    """Returns the text and the JSON of the command without a sweep."""
    process = run_command("dualsm.recommend", *arguments, f"--output={tmp_path / 'a.json'}")
    assert process.returncode == 0, process.stderr
    return process.stdout, json.loads((tmp_path / "a.json").read_text())


def as_json(found):
    return json.loads(json.dumps(found._asdict() | {r: getattr(found, r)._asdict() for r in ROLES}))


def test_the_confirmed_runs_answer_without_a_sweep(tmp_path):
    """--metric may name the metric that they were chosen by."""
    text, content = run(tmp_path, "--unique_tokens=1e6", "--budget=1.28e8", f"--metric={LOSS}")
    found = answer(round_repetitions(1e6, 1.28e8))
    assert content["confirmed"] == as_json(found)
    assert content["methods"]["causal dropout"]["dropout"] == 0.1
    assert content["sizes"] == [size._asdict() for size in read_sizes()]
    assert content["small_share"] is None
    assert "\n".join(describe_confirmed(found)) in text
    assert CONFIRMED in text and UNKNOWN_SIZE in text and "left out" not in text
    assert content["source"] == "rules" and len(content["others"]) == 1


def test_the_confirmed_runs_answer_for_each_source(tmp_path):
    questions = {"small": (1e6, 3.2e7), "large": (3e6, 3.84e8)}
    sources = [f"--source={name}:{unique:.0f}:{budget:.0f}" for name, (unique, budget) in questions.items()]
    text, content = run(tmp_path, *sources, "--parameters=230336")
    assert UNKNOWN_SIZE not in text
    parts = text.split("source large, share ")
    config = micro_config()
    for (name, question), part in zip(questions.items(), parts, strict=True):
        add_source(config, name, "corpus", repetitions=1)
        found = answer(round_repetitions(*question), 230_336)
        assert content["sources"][name]["confirmed"] == as_json(found)
        (lines,) = re.findall(f"{CONFIRMED}.*\n.*\n(.*)\n", part)
        pairs = re.findall(r"--config\.(\S+)=(\S+)", lines)
        assert all(key.startswith(f"sources.{name}.") for key, _ in pairs)  # one weight decay per run
        config.update_from_flattened_dict({key: parse_value(value) for key, value in pairs})
        assert config.sources[name].mixture.causal == found.mixture.alpha
        assert config.sources[name].repetitions == found.repetitions
        assert f"weight decay {found.mixture.weight_decay:g} (of the whole run)" in part
        assert "one weight decay for all sources; those of these answers differ (0.3 to 1)" in text
    check_config(config)
    assert config.sources.small.mixture.causal != config.sources.large.mixture.causal


def test_another_metric_leaves_the_confirmed_runs_out_and_says_so(tmp_path):
    metric = "valid/masked_diffusion/loss"
    text, content = run(tmp_path, "--unique_tokens=1e6", "--budget=1.28e8", f"--metric={metric}")
    assert "confirmed" not in content and CONFIRMED not in text
    (line,) = [line for line in text.splitlines() if "left out" in line]
    assert f"not by --metric={metric}" in line


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a:1e6"], "is not of the form NAME:UNIQUE_TOKENS:BUDGET"),
        (["a:1e6:much"], "is not of the form NAME:UNIQUE_TOKENS:BUDGET"),
        (["a:0:1e7"], "at least 1 and finite"),
        (["a b:1e6:1e7"], "the name must be an identifier"),
        (["causal:1e6:1e7"], "'causal' is reserved"),
        (["ema:1e6:1e7"], "'ema' is reserved"),
        (["a:1e6:1e7", "a:1e6:1e7"], "'a' is given twice"),
    ],
)
def test_sources_that_cannot_be_parsed_are_named(texts, message):
    with pytest.raises(UserError, match=message):
        parse_sources(texts)


ERRORS = {
    "missing sweep": (["--sweep=nowhere"], {}, ["nowhere"]),
    "zero tokens": ([], {"unique": 0}, ["--unique_tokens"]),
    "infinite size": (["--parameters=inf"], {}, ["--parameters=inf must be finite"]),
    "undefined size": (["--parameters=nan"], {}, ["--parameters=nan must be finite"]),
    "empty metric": (["--metric="], {}, ["--metric is empty; leave it out"]),
    "not a number": ([], {"unique": "much"}, ["--unique_tokens"]),
    "not finite": ([], {"budget": "inf"}, ["--budget", "finite"]),
    "no such metric": (["--sweep={table}", "--metric=speed"], {}, ["speed", "choose one of", LOSS]),
    "output below a file": (
        ["--sweep={table}", "--output={table}/a.json"],
        {},
        ["--output: cannot create the folder"],
    ),
    "not a sweep folder": (["--sweep={sweep}/cells"], {}, ["no sweep at", "sweep.json"]),
    "not a table": (["--sweep={sweep}/sweep.json"], {}, ["no column"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, sweep, table):
    arguments, question, texts = ERRORS[case]
    fail_with(
        *texts, arguments=[argument.format(sweep=sweep, table=table) for argument in arguments], **question
    )
