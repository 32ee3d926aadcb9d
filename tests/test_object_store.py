"""Every command on paths in a bucket, against an emulator of Google Cloud Storage."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from dualsm.data import build
from dualsm.data.batches import BatchSource, OrderedDocuments
from dualsm.data.corpus import Corpus
from dualsm.data.sequence_order import SequenceOrder
from dualsm.exchange import average_checkpoints, import_huggingface, import_reference
from dualsm.process import output, urls
from dualsm.process.errors import UserError
from dualsm.process.paths import files_in, upload, user_path
from tests.conftest import ROOT, command_env, run_command
from tests.data.reading import read
from tests.killing import problems
from tests.object_store import BUCKET, object_store
from tests.processes import launch

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")
pytestmark = pytest.mark.extras

HOME = f"gs://{BUCKET}/some folder"
RECIPE = """
from tests.micro import micro_config


def get_config(arg=None):
    config = micro_config({corpus!r})
    config.optimizer.name, config.valid.objectives, config.checkpoint.every = "adamw", "causal", 4
    config.mixture.update({{"causal": 0.5, "masked_diffusion": 0.5, "prefix": 0.0}})
    return config
"""


@pytest.fixture(scope="module")
def store():
    """Returns a store that this process and its subprocesses use."""
    with object_store() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


def command(*arguments: str, status: int = 0) -> subprocess.CompletedProcess:
    done = run_command(*arguments)
    assert done.returncode == status, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def corpus(store, jsonl):
    """Returns a corpus in the bucket, prepared from a glob in the bucket."""
    lines = jsonl.read_text().splitlines(keepends=True)
    for number, half in enumerate((lines[::2], lines[1::2])):
        user_path(f"{HOME}/text/part {number}/a.jsonl").write_text("".join(half))
    flags = ["--vocab_size=512", "--valid_fraction=0.05", "--workers=1"]
    command(
        "dualsm.prepare",
        f"--input={HOME}/text/**/*.jsonl",
        f"--output={HOME}/corpus",
        *flags,
    )
    again = command(
        "dualsm.prepare",
        f"--input={HOME}/text/**/*.jsonl",
        f"--output={HOME}/corpus",
        *flags,
    )
    assert "already contains this corpus" in again.stdout
    return f"{HOME}/corpus"


@pytest.fixture(scope="module")
def recipe(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(RECIPE.format(corpus=corpus))
    return path


@pytest.fixture(scope="module")
def local(recipe, tmp_path_factory):
    """Returns a run in a local folder, the reference."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    command("dualsm.train", f"--config={recipe}", f"--workdir={workdir}")
    return workdir


def download(remote: str, folder):
    """Copies a folder from the bucket; returns the path of the copy."""
    for path in files_in(remote):
        target = folder / path.relative_to(user_path(remote))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def run(store, recipe, local):
    """Returns a run in the bucket that was killed during a save, and then resumed to its end."""
    workdir = f"{HOME}/run"
    process = subprocess.Popen(
        [sys.executable, "-m", "dualsm.train", f"--config={recipe}", f"--workdir={workdir}"],
        cwd=ROOT,
        env=command_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def kill_before_commit(method: str, body: bytes) -> bool:
        commits = method == "POST" and b"run/checkpoints/8/commit_success.txt" in body
        if commits:
            os.kill(process.pid, signal.SIGKILL)
        return commits

    store.swallows = kill_before_commit
    assert process.wait(timeout=300) == -signal.SIGKILL
    store.swallows = lambda method, body: False
    left = user_path(workdir) / "checkpoints" / "8"
    assert left.exists()
    resumed = command("dualsm.train", f"--config={recipe}", f"--workdir={workdir}")
    assert f"resuming {workdir} at step 4 of 12" in resumed.stdout
    return workdir


def test_the_requests_of_a_start_do_not_depend_on_the_number_of_shards(store, jsonl, tmp_path, monkeypatch):
    """Then a batch opens only the shards that it reads, and equals that of a local corpus."""

    def batch(folder: str) -> tuple[int, BatchSource]:
        """Returns the number of requests that opened a corpus, and its batches."""
        before = store.requests
        documents = Corpus(folder).documents("train")
        order = SequenceOrder(documents.lengths, 2048, 32, 1, seed=0)
        return store.requests - before, BatchSource([OrderedDocuments(documents, order)], 2, 32, 0, range(2))

    def requested() -> set[str]:
        return {name.rpartition("/")[2] for name in store.names}

    requests = {}
    for shards in (8, 24):
        monkeypatch.setattr(build, "_MIN_BUCKETS", shards)
        local, remote = str(tmp_path / f"{shards}"), f"{HOME}/{shards} shards"
        recipe = build.Recipe(input=str(jsonl), vocab_size=512, valid_fraction=0.05)
        manifest = build.build(recipe, local, workers=1, quiet=True)
        names = {entry["file"] for entry in manifest["splits"]["train"]["shards"]}
        assert len(names) == shards
        upload(local, user_path(remote))
        store.names.clear()
        requests[shards], source = batch(remote)
        assert not names & requested()
        assert np.array_equal(source[3]["tokens"], batch(local)[1][3]["tokens"])
        assert 0 < len(names & requested()) < shards
    assert requests[24] <= requests[8] + 2, requests  # the manifest is longer


def test_prepare_starts_over_after_an_interrupted_upload(store, jsonl, tmp_path, monkeypatch):
    recipe = build.Recipe(input=str(jsonl), vocab_size=512, valid_fraction=0.05)
    remote = f"{HOME}/interrupted"

    def upload_some(folder, target, last):
        for path in pathlib.Path(folder).glob("[mv]*"):  # the manifest and the files of a split
            path.unlink()
        upload(folder, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output, "upload", upload_some)
        build.build(recipe, remote, workers=1, quiet=True)
    user_path(f"{remote}/old").write_text("of the interrupted upload")
    assert (user_path(remote) / ".incomplete").exists()
    build.build(recipe, remote, workers=1, quiet=True)
    names = {path.name for path in files_in(remote)}
    assert "manifest.json" in names and not names & {"old", ".incomplete"}
    expected = build.build(recipe, str(tmp_path / "local"), workers=1, quiet=True)
    assert Corpus(remote).identity == expected["identity"]

    user_path(f"{remote}/.incomplete").write_text("")  # only the removal of this object was interrupted
    assert build.build(recipe, remote, workers=1, quiet=True) == expected
    assert {path.name for path in files_in(remote)} == names


@pytest.mark.parametrize(
    "write",
    [
        lambda source, target: import_huggingface.load(source, "", None, target),
        lambda source, target: import_reference.load(source, "", None, target),
        lambda source, target: average_checkpoints.write(source, [], 2, target),
    ],
    ids=["huggingface", "reference", "average"],
)
def test_convert_removes_an_interrupted_upload_before_it_checks_the_folder(store, tmp_path, write):
    target = user_path(f"{HOME}/interrupted run")
    for name in (".incomplete", "source.json"):
        (target / name).write_text("")
    with pytest.raises(UserError, match="nothing"):  # the source does not exist
        write(tmp_path / "nothing", target)
    assert not files_in(target)
    (target / "config.json").write_text("")
    with pytest.raises(UserError, match="already exists"):
        write(tmp_path / "nothing", target)
    (target / "config.json").unlink()


def test_parquet_files_in_a_bucket_are_streamed(store, tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"text {i}" for i in range(3000)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=1000)
    user_path(f"{HOME}/a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    monkeypatch.setattr(urls, "local_input", None)
    assert read(f"{HOME}/a.parquet") == texts


def test_a_run_killed_during_a_save_resumes_and_equals_a_local_run(run, local, tmp_path):
    assert not problems([], download(run, tmp_path / "run"), local)


def test_evaluate_and_sample(run, tmp_path):
    command("dualsm.evaluate", f"--workdir={run}", "--tasks=valid", "--valid_samples=1")
    command("dualsm.evaluate", f"--workdir={run}", "--tasks=valid", f"--output={HOME}/scores.json")
    merged = json.loads((user_path(run) / "eval" / "step_12.json").read_text())
    alone = json.loads(user_path(f"{HOME}/scores.json").read_text())
    assert merged["held_out"]["causal"]["nats_per_token"] > 0
    assert merged["held_out"].keys() == alone["held_out"].keys()
    user_path(f"{HOME}/prompts.txt").write_text("def f(\nimport\n")
    flags = [
        "--tokens=3",
        f"--prompts={HOME}/prompts.txt",
        f"--output={HOME}/texts.jsonl",
    ]
    command("dualsm.sample", f"--workdir={run}", *flags)
    assert len(user_path(f"{HOME}/texts.jsonl").read_text().splitlines()) == 2
    missing = command("dualsm.sample", f"--workdir={HOME}/nothing", status=2)
    assert f"no run at {HOME}/nothing" in missing.stderr


def test_export_import_and_average(run, tmp_path):
    pytest.importorskip("safetensors")
    for form in ("huggingface", "reference"):
        output = f"{HOME}/exported {form}"
        export = ("dualsm.convert", "export", f"--format={form}", f"--workdir={run}", f"--output={output}")
        command(*export)
        again = command(*export, status=2)
        assert "already exists" in again.stderr
        names = {path.name for path in files_in(output)}
        assert {"model.safetensors", "tokenizer.json"} <= names and ".incomplete" not in names
        imported = f"{HOME}/imported {form}"
        if form == "reference":
            command(
                "dualsm.convert", "import", f"--format={form}", f"--weights={output}", f"--workdir={imported}"
            )
            command("dualsm.sample", f"--workdir={imported}", "--tokens=2", "--prompt=a")
    for name in (".incomplete", "source.json"):  # of an interrupted upload
        (user_path(HOME) / "mean" / name).write_text("")
    command("dualsm.convert", "average", f"--workdir={run}", "--last=2", f"--output={HOME}/mean")
    command("dualsm.sample", f"--workdir={HOME}/mean", "--tokens=2", "--prompt=a")
    assert (user_path(HOME) / "mean" / "config.json").exists()


def test_a_sweep_with_two_cells_and_its_recommendation(store, recipe):
    folder = f"{HOME}/sweep"
    sweep = ("dualsm.sweep", f"--config={recipe}", f"--workdir={folder}", "--grid=alpha=0,1", "--tasks=valid")
    done = command(*sweep, "--grid=repetitions=1")
    table = (user_path(folder) / "table.csv").read_text().splitlines()
    assert len(table) == 3 and all(",done," in line for line in table[1:]), done.stdout
    assert {path.name for path in (user_path(folder) / "logs").iterdir()} == {
        f"{path.name}.log" for path in (user_path(folder) / "cells").iterdir()
    }
    again = command(*sweep, "--grid=repetitions=1")
    assert "table.csv" in again.stdout
    few = command("dualsm.recommend", "--unique_tokens=1e6", "--budget=1e6", f"--sweep={folder}", status=2)
    assert "Traceback" not in few.stderr


def test_training_while_one_in_twenty_requests_fails(store, recipe, local, tmp_path):
    workdir, before = f"{HOME}/disturbed", store.requests
    store.fault_rate = 1 / 20
    try:
        done = command("dualsm.train", f"--config={recipe}", f"--workdir={workdir}")
    finally:
        store.fault_rate = 0.0
    assert store.requests - before > 100 and store.faults.total() > 5, store.faults
    assert set(store.faults) >= {"unavailable", "dropped before"}, store.faults
    assert not problems([], download(workdir, tmp_path / "run"), local), done.stderr


def test_a_job_of_two_processes_while_requests_fail(store, recipe, tmp_path):
    """The weights equal those of a job on a local folder, whose processes sum in the same order."""
    remote, flags = f"{HOME}/two processes", (f"--config={recipe}", "--config.mesh.data=2")
    done = launch(2, 1, *flags, f"--workdir={tmp_path / 'local'}")
    assert done.returncode == 0, done.stderr[-3000:]
    store.fault_rate, before = 1 / 20, store.faults.total()
    try:
        done = launch(2, 1, *flags, f"--workdir={remote}")
    finally:
        store.fault_rate = 0.0
    assert done.returncode == 0, done.stderr[-3000:]
    assert store.faults.total() - before > 5, store.faults
    assert not problems([], download(remote, tmp_path / "copy"), tmp_path / "local"), done.stderr
