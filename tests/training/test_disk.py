"""Full, read-only and unmounted disks, on a real file system of 6 MB."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dualsm.rundir.metrics import read_metrics
from tests.conftest import ROOT, command_env

SAVED = "while ls run/checkpoints/*tmp >/dev/null 2>&1; do sleep 0.05; done; "  # waits for a save
FILL = SAVED + "cat /dev/zero > fill 2>/dev/null; true"
FREE = "rm fill"
READ_ONLY = SAVED + "mount --bind run run && mount -o remount,bind,ro run"
VANISH = SAVED + 'umount --lazy "$PWD"'  # like a lost network disk; the mount point is an empty folder

# Trains the micro config in ./run, saves every second step, and runs a shell command after some steps.
DRIVER = """
import json, os, subprocess, sys
from dualsm.process import cli
from tests.micro import micro_config

corpus, actions, retries = sys.argv[1], json.loads(sys.argv[2]), 1
del sys.argv[1:]

def main(_):
    from dualsm.training.loop import train
    config = micro_config(corpus)
    config.checkpoint.every, config.checkpoint.max_failed_saves = 2, 3
    config.checkpoint.final_retries = retries
    config.valid.objectives = "causal"

    def after(step):
        subprocess.run(actions.get(str(step), "true"), shell=True, check=True)
        return False

    train(config, os.path.abspath("run"), after)

cli.run(main)
"""


def tmpfs_works() -> bool:
    if not shutil.which("unshare"):
        return False
    probe = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not tmpfs_works(), reason="no tmpfs can be mounted here without privileges"),
]


def train_on_small_disk(corpus_path: Path, folder: Path, actions: dict[int, str]):
    """Trains on a file system of 6 MB; returns the process, and copies the run directory to `folder`/run."""
    folder.mkdir()
    (folder / "driver.py").write_text(DRIVER)
    before = "cp -a ../../kept/run ." if (folder.parent / "kept").exists() else "true"
    script = (
        f"mount -t tmpfs -o size=6m tmpfs disk && cd disk && {before} && "
        '"$0" ../driver.py "$1" "$2"; code=$?; cp -a run "$3"; exit $code'
    )
    (folder / "disk").mkdir()
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, sys.executable]
        + [str(corpus_path), json.dumps(actions), str(folder)],
        cwd=folder,
        env=command_env(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def learned(workdir: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in read_metrics(workdir)]


def saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(corpus_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("disk") / "undisturbed"
    process = train_on_small_disk(corpus_path, folder, {})
    assert process.returncode == 0, process.stderr
    return folder / "run"


def test_training_continues_while_the_disk_is_full(corpus_path, undisturbed, tmp_path):
    process = train_on_small_disk(corpus_path, tmp_path / "run", {3: FILL, 8: FREE})
    assert process.returncode == 0, process.stderr
    assert "step 4 could not be saved" in process.stderr
    assert "step 6 could not be saved" in process.stderr
    workdir = tmp_path / "run" / "run"
    assert learned(workdir) == learned(undisturbed)
    assert saved(workdir) == saved(undisturbed) == [10, 12]


@pytest.mark.parametrize("trouble", [FILL, READ_ONLY, VANISH], ids=["full", "read-only", "vanished"])
def test_run_fails_if_the_disk_stays_full_and_resumes(corpus_path, undisturbed, tmp_path, trouble):
    process = train_on_small_disk(corpus_path, tmp_path / "run", {5: trouble})
    assert process.returncode == 2, process.stderr
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the checkpoint of step 12 could not be saved"), last
    assert "to resume from step 4" in last
    (tmp_path / "kept").mkdir()
    shutil.copytree(tmp_path / "run" / "run", tmp_path / "kept" / "run")
    assert saved(tmp_path / "kept" / "run") == [2, 4]
    assert not list((tmp_path / "run" / "disk").iterdir())  # nothing is written to the mount point

    process = train_on_small_disk(corpus_path, tmp_path / "again", {})
    assert process.returncode == 0, process.stderr
    assert "at step 4 of 12" in process.stdout + process.stderr
    assert learned(tmp_path / "again" / "run") == learned(undisturbed)


def test_full_disk_at_the_start_is_a_user_error(corpus_path, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    workdir = "/proc/run"  # a file system without mkdir
    process = subprocess.run(
        [sys.executable, "-m", "dualsm.train", "--config=dualsm:tiny", f"--workdir={workdir}"]
        + [f"--config.data.path={corpus_path}"],
        cwd=ROOT,
        env=command_env(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 2
    assert process.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in process.stderr
