"""`launch/gke_xpk.sh` with xpk's own dry run: the manifest, and the command of the container."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dualsm.rundir.metrics import read_metrics
from tests.conftest import ROOT, command_env
from tests.processes import write_recipe

pytestmark = pytest.mark.extras

VARIABLES = {"PROJECT": "p", "ZONE": "us-west4-a", "BUCKET": "b", "CLUSTER": "c", "TYPE": "v5litepod-16"}
VARIABLES |= {"NAME": "run", "SLICES": "2", "GRACE": "120"}


@pytest.fixture(scope="module")
def xpk() -> str:
    found = shutil.which(os.environ.get("XPK", "xpk"))
    return found or pytest.skip(
        "xpk is not installed (extra test-launch, in a venv of its own; XPK=its path)"
    )


@pytest.fixture
def manifest(xpk, tmp_path):
    """Returns the manifest that xpk writes in a dry run, for arguments of training."""

    def write(*arguments: str) -> dict:
        env = {"PATH": f"{Path(xpk).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)} | VARIABLES
        script = ["bash", str(ROOT / "launch" / "gke_xpk.sh"), "--dry-run", "train", *arguments]
        printed = subprocess.run(script, env=env, capture_output=True, text=True)
        assert printed.returncode == 0, printed.stderr
        path = tmp_path / "manifest.yaml"
        command = shlex.split(printed.stdout)
        assert command[:3] == ["xpk", "workload", "create"]
        options = ["--dry-run", "--skip-validation", f"--output-manifest-file={path}"]
        done = subprocess.run([xpk, *command[1:], *options], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return yaml.safe_load(path.read_text())

    return write


def slices_of(manifest: dict) -> tuple[dict, dict]:
    """Returns the replicated job, and the specification of its pods."""
    (job,) = manifest["spec"]["replicatedJobs"]
    return job, job["template"]["spec"]["template"]["spec"]


def test_workload_restarts_except_after_user_errors(manifest):
    written = manifest("--config=c")
    job, pod = slices_of(written)
    assert written["spec"]["failurePolicy"]["maxRestarts"] == 100
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    restarted = set(rule["onExitCodes"]["values"])
    assert {75, 1, 137, 143} <= restarted  # stopped, a lost peer, killed, SIGTERM
    assert 2 not in restarted
    assert pod["terminationGracePeriodSeconds"] == 120


def test_workload_has_the_requested_slices(manifest):
    job, pod = slices_of(manifest("--config=c"))
    assert job["replicas"] == 2
    assert job["template"]["spec"]["parallelism"] == 4  # machines of a v5litepod-16
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == 4


class Container:
    """Runs a pod's command in a shell: `pip` does nothing, the bucket and /tmp/corpus are folders."""

    def __init__(self, manifest: dict, folder: Path):
        (container,) = slices_of(manifest)[1]["containers"]
        *shell, command = container["command"]
        assert shell == ["bash", "-c"]
        self.bucket = folder / "bucket"
        command = command.replace("gs://b/", f"{self.bucket}/").replace("/tmp/corpus", f"{folder}/copied")
        programs = folder / "bin"
        for name, does in (("pip", "true"), ("python", f'exec {shlex.quote(sys.executable)} "$@"')):
            (programs / name).parent.mkdir(exist_ok=True)
            (programs / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
            (programs / name).chmod(0o755)
        env = command_env() | {"PATH": f"{programs}:{os.environ['PATH']}"}
        self._command, self._env = [*shell, command], env

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


def test_container_exits_with_75_and_resumes(manifest, corpus_path, tmp_path):
    """Like Kubernetes with a preempted pod: SIGTERM to its first process, then the same command again."""
    recipe = write_recipe(tmp_path / "recipe with spaces.py", corpus_path, steps=1000, repetitions=100)
    overrides = ["--config.log.every=50", "--config.checkpoint.every=1000", "--config.valid.every=1000"]
    container = Container(manifest(f"--config={recipe}", *overrides), tmp_path)
    shutil.copytree(corpus_path, container.bucket / "corpora" / "run")
    workdir = container.bucket / "runs" / "run"
    pod = container.start()
    deadline = time.monotonic() + 600
    while len(read_metrics(workdir)) < 2 and pod.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    pod.send_signal(signal.SIGTERM)
    output, _ = pod.communicate(timeout=600)
    assert pod.returncode == 75, output
    pod = container.start()
    output, _ = pod.communicate(timeout=600)
    assert pod.returncode == 0, output
    assert f"resuming {workdir} at step" in output
    assert [record["step"] for record in read_metrics(workdir)] == list(range(0, 1001, 50))


@pytest.mark.parametrize("prepared", [True, False])
def test_user_errors_have_status_2(manifest, corpus_path, tmp_path, prepared):
    """A wrong flag, and a corpus that is not in the bucket, must not cause a restart."""
    container = Container(manifest("--config=tests/micro.py", "--config.nonsense=1"), tmp_path)
    if prepared:
        shutil.copytree(corpus_path, container.bucket / "corpora" / "run")
    pod = container.start()
    output, _ = pod.communicate(timeout=120)
    assert pod.returncode == 2, output
    expected = "nonsense" if prepared else f"error: no corpus at {container.bucket}/corpora/run/"
    assert expected in output
