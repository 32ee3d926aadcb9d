"""The report of a sweep: table, plots and text summary."""

import json

import pytest

from dualsm.analysis import plots, sweep_report
from dualsm.analysis.sweep_report import report, summary
from dualsm.analysis.table import make_table, read_table
from dualsm.process.errors import UserError
from dualsm.rundir.metrics import read_metrics
from tests.analysis.synthetic import grid, write_cell, write_plan, write_sweep
from tests.conftest import run_command

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_sweep_with_enough_cells_has_all_plots(tmp_path):
    write_sweep(tmp_path, grid([1, 16], [0, 1 / 8, 1]), missing=("later",))
    written = report(tmp_path)
    measures = ("valid_causal_loss", "valid_masked_diffusion_loss", "task_mean_causal")
    plots = [f"{kind}_{name}" for name in measures for kind in ("surface", "best_alpha")]
    assert [p.name for p in written] == ["table.csv", *(f"{p}.png" for p in [*plots, "loss_curves", "gap"])]
    assert all(path.read_bytes().startswith(PNG) for path in written[1:])
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in written} | {"cells", "sweep.json"}
    assert read_table(written[0])["status"].tolist() == ["done"] * 6 + ["missing"]


def test_an_early_report_has_the_possible_plots(tmp_path, capsys):
    values = {"repetitions": 1, "alpha": 0.5}
    name = write_cell(tmp_path, values)
    (tmp_path / "cells" / name / "cell.json").unlink()  # the cell is still running
    write_plan(tmp_path, {name: values, "later": {"repetitions": 4, "alpha": 0.5}})
    assert [path.name for path in report(tmp_path)] == ["table.csv", "loss_curves.png"]
    assert "1 running, 1 missing" in capsys.readouterr().out
    write_plan(tmp_path, {"later": values})
    assert [path.name for path in report(tmp_path)] == ["table.csv"]


@pytest.mark.parametrize("cost", ["tokens", "flops"])
def test_curves_of_the_report_are_over_the_cost(tmp_path, monkeypatch, cost):
    drawn = {}

    def record(figure, curves, cost):
        """Records what is drawn: images cannot be compared with numbers."""
        drawn.update(cost=cost, curves=curves)

    monkeypatch.setattr(plots, "plot_curves", record)
    write_sweep(tmp_path, grid([1], [0, 1]))
    report(tmp_path, cost)
    lines = read_metrics(tmp_path / "cells" / "repetitions=1,alpha=1")
    [(costs, losses)] = drawn["curves"]["causal"][1][1.0]
    assert drawn["cost"] == cost and list(costs) == [line[cost] for line in lines[1:]]
    assert list(losses) == [line["valid/causal/loss"] for line in lines[1:]]


@pytest.mark.parametrize("parameters", ["last", "ema", "both"])
def test_curves_and_gaps_need_losses_of_any_weights(tmp_path, monkeypatch, parameters):
    """Those of the weights of the last step take precedence over those of the averaged weights."""
    drawn = {}
    monkeypatch.setattr(plots, "plot_curves", lambda figure, curves, cost: drawn.update(curves=curves))
    write_sweep(tmp_path, grid([1], [0, 1]))
    for path in (tmp_path / "cells").glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if parameters == "both":
                line |= {name.replace("valid", "valid/ema"): 1.0 for name in line if "valid" in name}
        if parameters == "ema":
            lines = [{n.replace("valid", "valid/ema"): value for n, value in line.items()} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {"loss_curves.png", "gap.png"} <= {path.name for path in report(tmp_path)}
    [(_, losses)] = drawn["curves"]["causal"][1][1.0]
    name = f"valid/{'ema/' * (parameters == 'ema')}causal/loss"
    lines = read_metrics(tmp_path / "cells" / "repetitions=1,alpha=1")
    assert list(losses) == [line[name] for line in lines[1:]]


def test_one_number_of_repetitions_has_no_surface(tmp_path, capsys):
    write_sweep(tmp_path, grid([4], [0, 1 / 8, 1 / 2, 1]))
    assert [path.name for path in report(tmp_path)] == ["table.csv", "loss_curves.png", "gap.png"]
    assert "2 numbers of repetitions" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_a_missing_package_is_one_line_and_keeps_the_table(tmp_path, monkeypatch, package):
    write_sweep(tmp_path, grid([1, 4], [0, 1]))
    block(monkeypatch, package)
    with pytest.raises(UserError, match=r"pip install 'dualsm\[analysis\]'"):
        report(tmp_path)
    assert (tmp_path / "table.csv").exists()


def block(monkeypatch, package):
    """Makes imports of a package fail as if the package were not installed."""
    import builtins
    import sys

    real = builtins.__import__

    def fail(name, *args, **options):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=package)
        return real(name, *args, **options)

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", fail)


def test_command(tmp_path):
    write_sweep(tmp_path / "sweep", grid([1], [0, 1]))
    process = run_command("dualsm.analysis", f"--sweep={tmp_path / 'sweep'}")
    assert process.returncode == 0, process.stderr
    written = [line for line in process.stdout.splitlines() if not line.startswith("no ")]
    names = ("table.csv", "loss_curves.png", "gap.png")
    assert written[:3] == [str(tmp_path / "sweep" / name) for name in names]
    assert written[3].startswith("valid/causal/loss")
    assert written[4].split() == ["alpha", "R", "1"]
    process = run_command("dualsm.analysis", f"--sweep={tmp_path}")
    assert process.returncode == 2
    assert process.stderr.startswith("error: no sweep at")
    assert len(process.stderr.splitlines()) == 1


def cell(repetitions, alpha, loss, score=None, seed=0, status="done"):
    measured = {"valid/causal/loss": loss, "task/mean/causal": score}
    return {"status": status, "repetitions": repetitions, "alpha": alpha, "seed": seed} | {
        "budget_tokens": 1000, **measured
    }  # fmt: skip


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (999, "999"), (999.6, "1k"), (1_234, "1.23k"), (999_499, "999k"), (999_936, "1M"),
        (230_336, "230k"), (999_981_056, "1B"), (1.5e12, "1.5T"),
    ],
)  # fmt: skip
def test_numbers_in_titles_have_3_digits_and_a_unit(number, text):
    assert sweep_report._short(number) == text


@pytest.mark.parametrize(
    ("parameters", "size"),
    [
        ([230_336, 230_336], " of 230k parameters"), ([2e6, 230_336], " of 230k to 2M parameters"),
        ([None, 2e6], " of 2M parameters"), ([None, None], ""), ([230_336, 230_340], " of 230k parameters"),
    ],
)  # fmt: skip
def test_titles_have_the_range_of_model_sizes(parameters, size):
    table = make_table([cell(1, 1.0, 2.0) | {"parameters": count} for count in parameters])
    assert sweep_report._cells_text(table) == f"2 runs{size}, 1k tokens each"


def test_summary_shows_means_over_seeds_and_marks_the_best():
    table = make_table([
        cell(1, 1.0, 2.5, 30.0), cell(1, 0.125, 2.75, 31.0), cell(16, 0.125, 3.0), cell(16, 1.0, 3.25),
        cell(16, 1.0, 3.5, seed=1), cell(64, 1.0, None, status="running"),
    ])  # fmt: skip
    text = summary(table, ["valid/causal/loss", "task/mean/causal", "valid/prefix/loss"])
    assert text.split("\n\n") == [
        "valid/causal/loss\n"
        "alpha    R 1    R 16 \n"
        "-----  ------  ------\n"
        "1/8    2.750   3.000*\n"
        "1      2.500*  3.375 ",
        "task/mean/causal\n"
        "alpha     R 1 \n"
        "-----  -------\n"
        "1/8    31.000*\n"
        "1      30.000 ",
    ]  # fmt: skip


def test_summary_without_finished_cells_is_empty():
    assert summary(make_table([cell(1, 1.0, None, status="missing")]), ["valid/causal/loss"]) == ""
