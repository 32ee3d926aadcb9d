"""Several training processes on this machine, as tests start them."""

import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, command_env

STOPPED = 75
# Gloo gives up when processes first meet more than 30 seconds apart, as they may on a machine that is busy
# with other things (they compile first). Started again, they find what they compiled.
MET_TOO_LATE = "Gloo context initialization failed: DEADLINE_EXCEEDED"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_recipe(path: Path, corpus: Path, **changes) -> Path:
    """A config file for the micro config with changed top-level keys; the mesh takes all devices."""
    lines = [
        "from tests.micro import micro_config\n\n",
        "def get_config():",
        f"    config = micro_config({str(corpus)!r})",
        "    config.mesh.data = -1",
        "    config.valid.objectives = 'causal'",
        *(f"    config.{key} = {value!r}" for key, value in changes.items()),
        "    return config\n",
    ]
    path.write_text("\n".join(lines))
    return path


def start(
    count: int, devices: int, *arguments: str, module: str = "dualsm.train", last: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """Starts `count` processes of one job, with fake devices each; `last` goes to the last one only."""
    job = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}"]
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                module,
                *job,
                f"--process_id={i}",
                *arguments,
                *(last if i == count - 1 else ()),
            ],
            cwd=ROOT,
            env=command_env(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def launch(count: int, devices: int, *arguments: str) -> subprocess.CompletedProcess:
    """Runs `launch/local.sh` to its end."""
    env = command_env(devices)
    del env["XLA_FLAGS"]  # which the script sets itself
    for _ in range(3):
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "local.sh"), *arguments],
            cwd=ROOT,
            env=env | {"PROCESSES": str(count), "DEVICES": str(devices), "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if MET_TOO_LATE not in done.stderr:
            break
    return done


def end(process: subprocess.Popen) -> str:
    """Makes sure that a process has ended; returns what it wrote to stderr."""
    process.kill()
    return process.communicate()[1]
