"""Paths of users: every reader passes them through `user_path`, which knows buckets and `~`."""

import errno
import importlib.util
import shutil
import subprocess
import sys

import pytest
from etils import epath

from dualsm.analysis.table import load
from dualsm.data.build import Recipe, build
from dualsm.data.corpus import Corpus
from dualsm.data.inputs import find_inputs
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.evaluation.tasks import task_files
from dualsm.exchange.hub import local_path
from dualsm.generation.prompts import read_prompts
from dualsm.process import paths
from dualsm.process.errors import BucketError, UserError, exit_status, user_message
from dualsm.process.output import new_folder, write_atomically
from dualsm.process.paths import absolute, files_in, is_remote, local_copy, retry, user_path
from dualsm.rundir.metrics import read_metrics
from dualsm.rundir.trained_run import open_run
from dualsm.sweeps.cells import collect
from tests.conftest import command_env

BUCKET = "gs://bucket/some/x"


def enter(context) -> None:
    with context:
        pass


READERS = {
    "corpus": lambda: Corpus(BUCKET),
    "prepare --input": lambda: find_inputs(f"{BUCKET}.jsonl"),
    "prepare --output": lambda: build(Recipe(__file__, vocab_size=384, valid_input=__file__), BUCKET, 1),
    "tokenizer": lambda: load_tokenizer(BUCKET),
    "run": lambda: open_run(BUCKET),
    "metrics": lambda: read_metrics(BUCKET),
    "task data": lambda: task_files("blimp", BUCKET),
    "prompts": lambda: read_prompts(BUCKET),
    "weights": lambda: enter(local_path(BUCKET)),
    "sweep": lambda: collect(BUCKET),
    "table": lambda: load(BUCKET),
}


@pytest.mark.parametrize("name", READERS)
def test_a_bucket_without_gcsfs_is_one_line(name, monkeypatch):
    """The path in the message is complete: no reader turned `gs://` into `gs:/` before."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("dualsm.data.build.inputs.find_inputs", lambda *args: [])
    with pytest.raises(
        UserError, match=f"^{BUCKET}.*: gcsfs is not installed; run pip install 'dualsm.gcs.'"
    ):
        READERS[name]()


def test_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == epath.Path(tmp_path / "a")
    assert is_remote("gs://a/b") and not is_remote("a/gs://b") and not is_remote("/a,gs://b")
    assert absolute("a") == epath.Path("a").absolute()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # also without gcsfs
    assert absolute(BUCKET) == epath.Path(BUCKET)
    with pytest.raises(UserError, match="s3://a: only Google Cloud Storage is supported"):
        user_path("s3://a")


@pytest.mark.parametrize("root", ["gs", "s3", "az", "hf"])
def test_local_folders_named_like_an_object_store_stay_local(monkeypatch, tmp_path, root):
    """etils reads /hf/x as hf://x."""
    monkeypatch.setenv("HOME", f"/{root}/home")
    monkeypatch.setattr(paths.os, "getcwd", lambda: f"/{root}/here")
    for path in (user_path(f"/{root}/x"), user_path("~/x"), absolute("x"), absolute(f"/{root}/x") / "y"):
        assert not is_remote(path) and str(path).startswith(f"//{root}/")  # the same file as /{root}/
        assert not path.exists() and not epath.Path(path).parent.exists()
        assert user_path(path) == absolute(path) == path


def test_local_files_are_listed_and_not_copied(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("a", "b/c/d"):
        (tmp_path / name).write_text(name)
    assert [path.read_text() for path in files_in(tmp_path)] == ["a", "b/c/d"]
    with local_copy(tmp_path / "a") as copy:
        assert copy == str(tmp_path / "a")


class Flaky:
    """A function that fails a number of times."""

    def __init__(self, failures: int):
        self.failures = failures

    def __call__(self) -> str:
        self.failures -= 1
        if self.failures >= 0:
            raise ConnectionError("the connection was reset")
        return "done"


def test_work_on_a_bucket_is_retried_with_increasing_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(paths.time, "sleep", pauses.append)
    assert retry(Flaky(3), BUCKET) == "done"
    assert len(pauses) == 3 and all(2**i / 2 <= pause <= 2**i for i, pause in enumerate(pauses))
    with pytest.raises(OSError, match="the connection was reset") as caught:
        retry(Flaky(99), BUCKET)
    assert "check the name of the bucket" in user_message(caught.value)
    assert exit_status(caught.value) == 1  # launchers repeat the command
    with pytest.raises(ConnectionError):  # local paths fail at once
        retry(Flaky(1), "local")


@pytest.mark.parametrize("error", [ConnectionError("503"), UserError("process 0: 503")])
def test_all_processes_retry_an_error_on_which_they_agreed(monkeypatch, error):
    """`together` raises the error itself in one process, and another one in the others."""
    attempts = []
    monkeypatch.setattr(paths.time, "sleep", lambda seconds: None)

    def fail():
        attempts.append(1)
        raise error

    error.agreed = True
    with pytest.raises(BucketError, match="503") as caught:
        retry(fail, BUCKET, attempts=3)
    assert len(attempts) == 3 and caught.value.agreed
    error.agreed = False
    with pytest.raises(UserError if isinstance(error, UserError) else BucketError) as caught:
        retry(fail, BUCKET, attempts=3)
    assert len(attempts) == (4 if isinstance(error, UserError) else 6)


def test_missing_objects_are_user_errors_and_other_missing_files_are_not():
    """Neither gcsfs nor Orbax sets the errno of a FileNotFoundError."""
    fsspec = pytest.importorskip("fsspec")
    with pytest.raises(FileNotFoundError) as missing:
        fsspec.filesystem("memory").open("/nothing")
    assert user_message(missing.value) == "/nothing does not exist; check the path"
    assert exit_status(missing.value) == 2
    with pytest.raises(FileNotFoundError) as own:
        raise FileNotFoundError("no checkpoint")
    assert user_message(own.value) is None


def test_a_command_that_cannot_reach_a_bucket_exits_with_status_1():
    """GKE and the scripts of launch/ repeat a command with status 1, but not one with status 2."""
    code = (
        "from dualsm.process import cli, errors\n"
        "def main(argv):\n raise errors.BucketError(5, '503', 'gs://bucket/run')\n"
        "cli.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=command_env())
    assert done.returncode == 1
    assert (
        done.stderr.startswith("error: [Errno 5] 503: 'gs://bucket/run'; check")
        and "Trace" not in done.stderr
    )


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """Returns a local folder that counts as a bucket; records the order of its writes."""
    order, upload = [], paths.upload
    monkeypatch.setattr("dualsm.process.output.is_remote", lambda path: str(path).startswith(str(tmp_path)))
    monkeypatch.setattr("dualsm.process.output.write_object", lambda path, content: write(path, content))
    monkeypatch.setattr(paths, "_retry", lambda work, path: (order.append(path.name), work())[1])

    def write(path, content):
        order.append(path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    monkeypatch.setattr("dualsm.process.output.upload", upload)
    return epath.Path(tmp_path) / "target", order


def test_the_marker_of_a_folder_in_a_bucket_is_written_last(bucket):
    target, order = bucket
    with new_folder(target, "--output", last="manifest") as folder:
        for name in ("zzz", "manifest", "a"):
            (folder / name).write_text(name)
    assert order[:2] == [".incomplete"] * 2  # a probe before the work, and the start of the upload
    assert order[-1] == "manifest" and sorted(order[2:-1]) == ["a", "zzz"]
    assert sorted(path.name for path in target.iterdir()) == ["a", "manifest", "zzz"]
    with pytest.raises(UserError, match="already exists"), new_folder(target, "--output", last="manifest"):
        pass


def test_leftovers_of_an_interrupted_upload_are_replaced(bucket):
    target, _ = bucket
    target.mkdir()
    for name in (".incomplete", "old"):
        (target / name).write_text("")
    with new_folder(target, "--output", last="manifest") as folder:
        (folder / "manifest").write_text("new")
    assert [path.name for path in target.iterdir()] == ["manifest"]


def test_a_failed_block_writes_nothing_to_a_bucket(bucket):
    target, order = bucket
    with pytest.raises(ZeroDivisionError), new_folder(target, "--output", last="manifest") as folder:
        (folder / "manifest").write_text(str(1 / 0))
    assert order == [".incomplete"] and not any(target.iterdir())  # the probe


def test_a_bucket_that_is_not_writable_ends_the_command_before_its_work(bucket, monkeypatch):
    def refuse(path, content):
        raise BucketError(errno.EIO, "403", str(path))

    monkeypatch.setattr("dualsm.process.output.write_object", refuse)
    with pytest.raises(BucketError, match="403"), new_folder(bucket[0], "--output", last="manifest"):
        pytest.fail("the work has started")


def test_the_result_of_a_failed_upload_is_kept(bucket, monkeypatch):
    target, _ = bucket

    def fail(*args):
        raise BucketError(errno.EIO, "503", str(target))

    monkeypatch.setattr("dualsm.process.output.upload", fail)
    with (
        pytest.raises(BucketError, match="503; the complete folder is in") as caught,
        new_folder(target, "--output", last="manifest") as folder,
    ):
        (folder / "manifest").write_text("text")
    assert str(folder) in user_message(caught.value) and (folder / "manifest").read_text() == "text"
    shutil.rmtree(folder)


def test_a_file_in_a_bucket_is_written_without_a_rename(bucket):
    target, order = bucket
    write_atomically(target / "file", "text")
    assert order == ["file"] and (target / "file").read_text() == "text"
