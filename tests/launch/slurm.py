"""A temporary SLURM cluster on this machine: real daemons on loopback ports, with two nodes."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, command_env
from tests.processes import free_port

PACKAGES = ("slurm-wlm", "munge")
NODES = ("127.0.0.1", "127.0.0.2")  # addresses at which JAX's coordinator is reachable
_DAEMONS = ("munged", "slurmctld", "slurmd")
_PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])

# JAX derives its port from the job ID, so that concurrent clusters need different IDs. `cred_expire` is the
# time that a requeued job waits. Partition `batch` has a GraceTime, `hasty` has none.
_CONF = """
ClusterName=dualsm
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillOnBadExit=1
MinJobAge=86400
ReturnToService=1
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=hasty Nodes=ALL PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def install() -> None:
    """Installs SLURM if `make test-all` requests it; otherwise skips the tests if SLURM is missing."""
    if all(shutil.which(name, path=_PATH) for name in (*_DAEMONS, "sbatch")):
        return
    if not os.environ.get("DUALSM_TEST_ALL"):
        pytest.skip("SLURM is not installed; `make test-all` installs it (slurm-wlm, munge)")
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("SLURM is not installed, and installing slurm-wlm and munge takes root and apt-get")
    options = ["-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=30"]
    install = ["install", "--yes", "--no-install-recommends", *PACKAGES]
    script = (
        shlex.join(["apt-get", *options, "update"]) + " && " + shlex.join(["apt-get", *options, *install])
    )
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(["sh", "-c", script], env=env, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        pytest.skip("SLURM is not installed, and apt-get did not install it within 15 minutes")
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        pytest.skip(f"SLURM is not installed, and apt-get cannot install it: {reason}")


class Slurm:
    """A running cluster; a context manager."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # socket paths must be short
        self.conf = self.folder / "slurm.conf"
        self._daemons: list[subprocess.Popen] = []
        outer = {name: value for name, value in command_env().items() if not name.startswith("SLURM")}
        self.env = outer | {"SLURM_CONF": str(self.conf), "PATH": _PATH}

    def __enter__(self) -> Slurm:
        folder = self.folder
        nodes = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 Gres=gpu:2"
            for name in NODES
        ]
        self.conf.write_text(
            _CONF.format(
                folder=folder,
                port=free_port(),
                first=secrets.randbelow(2**20),
                user=getpass.getuser(),
                nodes="\n".join(nodes),
            )
        )
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        try:
            files = [f"--{name}-file={folder}/munged.{name}" for name in ("log", "pid", "seed")]
            self._start(
                "munged",
                "--foreground",
                "--force",
                f"--key-file={key}",
                f"--socket={folder}/munge.socket",
                *files,
            )
            self._wait((folder / "munge.socket").exists, "munged listens", 30)
            self._start("slurmctld", "-D", "-f", str(self.conf))
            for name in NODES:
                self._start("slurmd", "-D", "-N", name, "-f", str(self.conf))
            idle = lambda: self._try("sinfo", "--noheader", "--format=%T") == "idle"  # noqa: E731
            self._wait(idle, "both nodes are idle", 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if len(self._daemons) > 1:
            self._try("scancel", f"--user={getpass.getuser()}")
            deadline = time.monotonic() + 60
            while self._try("squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str) -> str:
        """Runs a SLURM command and returns its output."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path, **variables: str) -> str:
        """Submits a batch job from a folder; returns its ID."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            cwd=cwd,
            env=self.env | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """Returns a job's fields, such as JobState, Restarts and BatchHost; of an array's task as ID_TASK."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait_until(self, job: str, seconds: float = 300, **expected: str) -> dict[str, str]:
        """Waits until a job's fields have the expected values; returns all of its fields."""
        self._wait(
            lambda: expected.items() <= self.show(job).items(), f"job {job} has {expected}", seconds, job
        )
        return self.show(job)

    def wait_for(self, condition: Callable[[], object], what: str, job: str, seconds: float = 300) -> None:
        """Waits until a condition is true, while the job runs."""
        self._wait(condition, what, seconds, job)

    def has_task(self, job: str) -> bool:
        """Returns True if the first task of a job's step is running."""
        return self.task_pid(job, 0) is not None

    def task_pid(self, job: str, task: int) -> int | None:
        """Returns the process ID of one task of a running job step."""
        wanted = {f"SLURM_JOB_ID={job}", "SLURM_STEP_ID=0", f"SLURM_PROCID={task}"}
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # processes of other users, or processes that just ended
                env = set((path / "environ").read_text(errors="replace").split("\0"))
                if wanted <= env and "dualsm" in (path / "cmdline").read_text():
                    found.append(int(path.name))
        return min(found, default=None)

    def _start(self, name: str, *arguments: str) -> None:
        path = shutil.which(name, path=_PATH)
        log = (self.folder / f"{name}{len(self._daemons)}.log").open("w")
        with log:
            self._daemons.append(
                subprocess.Popen([path, *arguments], env=self.env, stdout=log, stderr=log, cwd=ROOT)
            )

    def _try(self, *command: str) -> str:
        """Runs a command that may fail while the daemons start; returns its distinct lines."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        return "\n".join(sorted(set(done.stdout.split("\n")) - {""}))

    def _wait(self, condition: Callable[[], object], what: str, seconds: float, job: str = "") -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                told = [f"{what}: not within {seconds} s"]
                if job:
                    fields = self.show(job)
                    log = Path(fields.get("StdOut", ""))
                    told += [str(fields), log.read_text(errors="replace") if log.is_file() else ""]
                else:
                    told += [path.read_text()[-2000:] for path in self.folder.glob("*.log")]
                raise AssertionError("\n".join(told))
            time.sleep(0.2)
