"""Collecting the cells of a sweep: the values of each record, and cells in every state."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from dualsm.analysis.table import make_table, seed_groups
from dualsm.model.transformer import init_params
from dualsm.process.errors import UserError
from dualsm.sweeps.cells import cell_record, collect, read_curve
from tests.analysis.synthetic import BUDGET, STEPS, write_cell, write_plan, write_sweep
from tests.micro import micro_config
from tests.micro_sources import two_sources

VALUES = {"repetitions": 4, "alpha": 0.25, "optimizer.learning_rate": 0.01, "seed": 3}


@pytest.fixture
def sweep(tmp_path):
    """Returns the folder of a sweep with one finished cell, and the folder of the cell."""
    name = write_cell(tmp_path, VALUES, name="cell")
    write_plan(tmp_path, {name: VALUES})
    return tmp_path, tmp_path / "cells" / name


def change_config(workdir, change):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def rewrite_metrics(workdir, change):
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_record_of_a_finished_cell(sweep):
    folder, workdir = sweep

    def dip(lines):
        for line, loss in zip(lines, [9.0, 5.0, 2.5, *np.linspace(3, 4, len(lines) - 3)], strict=True):
            line["valid/causal/loss"] = loss

    lines = rewrite_metrics(workdir, dip)
    [row] = collect(folder)
    assert row | VALUES == row
    assert (row["status"], row["reason"], row["seconds"], row["step"]) == ("done", None, 12.5, STEPS)
    assert (row["budget_tokens"], row["unique_tokens"]) == (BUDGET, BUDGET // 4)
    config = micro_config()
    config.model.vocab_size = 512
    params = init_params(config.model, jax.random.key(0))
    assert row["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert row["valid/causal/loss"] == 4.0
    assert (row["best/causal/loss"], row["best/causal/step"]) == (2.5, lines[2]["step"])
    assert row["valid/masked_diffusion/loss"] == lines[-1]["valid/masked_diffusion/loss"]
    assert row["train/causal/loss"] == lines[-1]["train/causal/loss"]  # the last twentieth has one log line
    assert row["task/mean/causal"] == pytest.approx((row["task/blimp/causal"] + row["task/piqa/causal"]) / 2)


def test_final_training_loss_is_a_mean_over_the_last_twentieth(sweep):
    _, workdir = sweep
    lines = [{"step": s, "tokens": s, "train/causal/loss": float(s)} for s in range(1, 101)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cell_record(workdir, "cell", VALUES)["train/causal/loss"] == np.mean([96, 97, 98, 99, 100])


def test_final_training_loss_weights_the_log_lines_by_their_steps(sweep):
    """With 250 steps and a line every 20, the last line covers 10; validations have lines of their own."""
    _, workdir = sweep
    lines = [{"step": step, "train/causal/loss": loss} for step, loss in ((220, 9.0), (240, 3.0), (250, 6.0))]
    lines.insert(2, {"step": 245, "valid/causal/loss": 7.0})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cell_record(workdir, "cell", VALUES)["train/causal/loss"] == pytest.approx((20 * 3 + 10 * 6) / 30)


def test_final_training_loss_of_a_fork_starts_at_its_first_step(sweep):
    _, workdir = sweep
    lines = [{"step": 238, "valid/causal/loss": 7.0}]
    lines += [{"step": step, "train/causal/loss": loss} for step, loss in ((240, 3.0), (250, 6.0))]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cell_record(workdir, "cell", VALUES)["train/causal/loss"] == pytest.approx((2 * 3 + 10 * 6) / 12)


@pytest.mark.parametrize(
    ("mixture", "schedule", "alpha"),
    [
        ({"causal": 0.25, "masked_diffusion": 0.75}, "constant", 0.25),
        ({"causal": 0.0, "masked_diffusion": 1.0}, "constant", 0.0),
        ({"causal": 0.5, "prefix": 0.25, "masked_diffusion": 0.25}, "constant", None),
        ({"masked_input_causal": 1.0}, "constant", None),
        ({"causal": 0.25, "masked_diffusion": 0.75}, "steps", None),
    ],
)
def test_alpha_follows_from_the_mixture(sweep, mixture, schedule, alpha):
    _, workdir = sweep
    change_config(workdir, lambda c: c.update(mixture=mixture, mixture_schedule={"name": schedule}))
    values = {f"mixture.{name}": share for name, share in mixture.items()}
    assert cell_record(workdir, "cell", values)["alpha"] == alpha


def test_default_values_are_read_from_the_config(tmp_path):
    """A cell that sets a key to its default value equals a cell that does not set the key."""
    default = micro_config().optimizer.weight_decay
    cells = [{"repetitions": 1, "alpha": 1, "optimizer.weight_decay": default}]
    cells += [{"repetitions": 1, "alpha": 1, "seed": seed} for seed in (1, 2)]
    cells += [{"repetitions": 1, "alpha": 1, "optimizer.weight_decay": 1}]
    write_sweep(tmp_path, cells)
    rows = collect(tmp_path)
    assert [row["optimizer.weight_decay"] for row in rows] == [default, default, default, 1.0]
    assert [row["seed"] for row in rows] == [0, 1, 2, 0]
    assert [len(group) for group in seed_groups(make_table(rows))] == [3, 1]


def test_later_evaluations_take_precedence(sweep):
    _, workdir = sweep
    late = {"checkpoint": STEPS + 1, "tasks": {"blimp": {"causal": {"normalised": 77.0}}}}
    (workdir / "eval" / "a.json").write_text(json.dumps(late))
    acceptance = {"draft": 8, "greedy": {"accepted_per_draft": 1.5, "stderr": 0.1}}
    acceptance["sampled"] = {"accepted_per_draft": 1.7}  # of one segment: no standard error
    books = {"nats_per_token": 1.5, "stderr": None}
    losses = {
        "causal": {"nats_per_token": 2.0},  # of a version without standard errors
        "prefix": {"nats_per_token": 1.0, "stderr": 0.25, "domains": {"books": books}},
    }
    infilling = {"accuracy": 0.5, "stderr": 0.1, "bits_per_byte": 3.0}
    held_out = {"checkpoint": 1, "held_out": losses, "acceptance": acceptance, "infilling": infilling}
    (workdir / "eval" / "b.json").write_text(json.dumps(held_out))
    row = cell_record(workdir, "cell", VALUES)
    assert row["task/blimp/causal"] == 77.0
    assert row["held_out/causal/loss"] == 2.0 and "held_out/causal/stderr" not in row
    assert (row["held_out/prefix/loss"], row["held_out/prefix/stderr"]) == (1.0, 0.25)
    assert (row["held_out/prefix/books/loss"], row["held_out/prefix/books/stderr"]) == (1.5, None)
    assert [row[f"infilling/{name}"] for name in infilling] == [0.5, 0.1, 3.0]
    assert [row[f"acceptance/{name}"] for name in ("greedy", "sampled")] == [1.5, 1.7]
    assert [row[f"acceptance/{name}/stderr"] for name in ("greedy", "sampled")] == [0.1, None]


def test_results_of_a_sweep_whose_folder_looks_like_a_glob(tmp_path):
    name = write_cell(tmp_path / "sw[1]", VALUES, name="cell")
    assert cell_record(epath.Path(tmp_path) / "sw[1]" / "cells" / name, name, VALUES)["task/blimp/causal"] > 0


def test_no_mean_score_without_all_tasks(tmp_path):
    cells = [{"repetitions": 1, "alpha": a} for a in (0.25, 0.5)]
    write_sweep(tmp_path, cells)
    path = tmp_path / "cells" / "repetitions=1,alpha=0.5" / "eval" / f"step_{STEPS}.json"
    result = json.loads(path.read_text())
    del result["tasks"]["piqa"]
    path.write_text(json.dumps(result))
    both, one = collect(tmp_path)
    assert "task/mean/causal" in both
    assert "task/mean/causal" not in one


def test_records_of_unfinished_cells(tmp_path):
    write_sweep(tmp_path, [VALUES | {"alpha": a} for a in (0.0, 0.5, 1.0)], missing=("later",))
    running, failed, diverged = sorted((tmp_path / "cells").iterdir())
    (running / "cell.json").unlink()
    for name in ("config.json", "metrics.jsonl"):
        (failed / name).unlink()
    outcome = {"status": "failed", "reason": "out of\nmemory", "seconds": 3}
    (failed / "cell.json").write_text(json.dumps(outcome))
    (diverged / "cell.json").write_text(json.dumps({"status": "diverged", "reason": "nan at step 512"}))
    rewrite_metrics(diverged, lambda lines: lines[-1].update({"valid/causal/loss": float("nan")}))
    rows = collect(tmp_path)
    assert [row["status"] for row in rows] == ["running", "failed", "diverged", "missing"]
    assert rows[0]["valid/causal/loss"] is not None
    assert (rows[1]["reason"], rows[1]["seconds"]) == ("out of memory", 3)
    assert rows[1]["alpha"] == 0.5  # from sweep.json
    assert rows[2]["valid/causal/loss"] is None
    assert rows[2]["best/causal/loss"] is not None
    assert rows[3] == {
        "name": "later", "status": "missing", "reason": None, "repetitions": 1, "alpha": 1.0, "seed": None,
        "optimizer.learning_rate": None,
    }  # fmt: skip


DAMAGE = {
    "truncated cell.json": ("cell.json", '{"status": "do', "cell.json"),
    "cell.json is a list": ("cell.json", "[1]", "not an object"),
    "unknown status": ("cell.json", '{"status": "dreaming"}', "dreaming"),
    "truncated config.json": ("config.json", '{"steps": 1', "config.json"),
    "config.json without keys": ("config.json", "{}", "is missing"),
    "config.json with text for a number": (
        "config.json", '{"steps": "many", "batch_size": 1, "seq_len": 2, "repetitions": 1}', "'many'",
    ),
    "zero repetitions": (
        "config.json", '{"steps": 1, "batch_size": 1, "seq_len": 2, "repetitions": 0}', "repetitions=0",
    ),
    "no config.json": ("config.json", None, "config.json is missing"),
    "metrics are lists": ("metrics.jsonl", "[1]\n[2]\n", ""),
    "truncated metrics line": ("metrics.jsonl", '{"step": 1, "va\n{"step": 2}\n', ""),
    "binary metrics": ("metrics.jsonl", b"\xff\xfe\x00\n", ""),
    "truncated evaluation": (f"eval/step_{STEPS}.json", '{"tasks": {', f"step_{STEPS}.json"),
    "evaluation with a wrong type": (f"eval/step_{STEPS}.json", '{"tasks": {"blimp": {"causal": 3}}}', ""),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_cell_has_a_record(sweep, case):
    folder, workdir = sweep
    name, content, reason = DAMAGE[case]
    if content is None:
        (workdir / name).unlink()
    else:
        (workdir / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    [row] = collect(folder)
    assert (row["name"], row["status"]) == ("cell", "damaged")
    assert reason in row["reason"]
    assert "\n" not in row["reason"]
    assert row["repetitions"] is not None


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", '{"grid": {}}', '{"cells": [1]}', '{"cells": {"a": 3}}']
)
def test_an_invalid_sweep_file_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json"):
        collect(tmp_path)


def test_curve(sweep):
    _, workdir = sweep
    lines = rewrite_metrics(workdir, lambda lines: lines[3].pop("valid/causal/loss"))
    tokens, losses = read_curve(workdir, "valid/causal/loss")
    del lines[3]
    assert tokens == [line["tokens"] for line in lines]
    assert losses == [line["valid/causal/loss"] for line in lines]
    assert read_curve(workdir / "nowhere", "valid/causal/loss") == ([], [])


def test_a_cell_with_sources_has_no_single_r_and_alpha(sweep):
    """Its losses are in the table, but no surface over R and alpha is fitted to them."""
    folder, workdir = sweep
    sources = two_sources().to_dict()["sources"]
    change_config(workdir, lambda config: config.update(sources=sources, repetitions=1))
    [row] = collect(folder)
    assert (row["status"], row["repetitions"], row["unique_tokens"], row["alpha"]) == (
        "done",
        None,
        None,
        None,
    )
    assert row["budget_tokens"] == BUDGET and row["valid/causal/loss"] is not None
