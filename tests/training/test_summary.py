"""The description of a run at its start and the summary at its end."""

import json
from types import SimpleNamespace

import jax
import pytest

from dualsm.objectives.plan import MixturePlan
from dualsm.rundir.metrics import read_metrics
from dualsm.training.loop import train
from dualsm.training.start import print_start
from dualsm.training.summary import summarize


def test_run_without_validation(micro, tmp_path, capsys):
    micro.mesh.data, micro.valid.objectives = -1, ""
    assert train(micro, tmp_path)
    said = capsys.readouterr().out
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert [name for name in ("checkpoints", "tensorboard") if f"{name}/" in said] == folders
    assert "held" not in said and "validating" not in said
    assert "tokens per second" in said
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert not any(name.startswith("valid/") for record in records for name in record)

    assert train(micro, tmp_path)  # the run is already complete
    assert capsys.readouterr().out.endswith(said.splitlines()[-1] + "\n")


def test_summary_without_metrics_names_the_run_directory(corpus, tmp_path):
    said = summarize(tmp_path, [corpus])
    files = f"{tmp_path}: config.json, metrics.jsonl"
    assert said == f"{files}, tensorboard/, checkpoints/"
    assert summarize(tmp_path, [corpus], tensorboard=False) == f"{files}, checkpoints/"


@pytest.mark.parametrize(("speeds", "shown"), [([10], "10"), ([10, 30], "30"), ([10, 30, 31, 32], "31")])
def test_speed_excludes_the_line_with_compilation(speeds, shown, tmp_path):
    lines = [{"step": i, "tokens": i, "perf/tokens_per_second": speed} for i, speed in enumerate(speeds, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert f"{len(speeds)} tokens, {shown} tokens per second" in summarize(tmp_path)


@pytest.mark.parametrize(
    ("name", "path", "shown"),
    [
        ("constant", "", "causal 0.5, prefix 0.25, masked_diffusion 0.25"),
        (
            "steps",
            "0.25 masked_diffusion=1; 0.75 causal=1",
            "causal 0.5 to 1 (mean 0.375), prefix 0.25 to 0 (mean 0.0625), "
            "masked_diffusion 0.25 to 0 (mean 0.562)",
        ),
    ],
)
def test_shares_that_change_are_shown_with_their_mean(name, path, shown, micro, capsys):
    """The order of documents is replaced by its numbers of tokens, to need no corpus."""
    micro.mixture.update({"causal": 0.5, "prefix": 0.25, "masked_diffusion": 0.25})
    micro.mixture_schedule.name, micro.mixture_schedule.path = name, path
    mesh = SimpleNamespace(size=1, devices=SimpleNamespace(flat=jax.devices()))
    plan, order = MixturePlan(micro), SimpleNamespace(budget=100, unique=50)
    print_start(micro, mesh, plan, [(None, order)], num_parameters=10)
    assert capsys.readouterr().out.splitlines()[-1] == f"mixture: {shown}"
