"""The summary at the end of a run."""

from dualsm.rundir.metrics import read_metrics
from dualsm.training.loop import train
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
