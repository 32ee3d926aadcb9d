"""Multi-process training jobs on this machine."""

import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import FAST_COMPILATION, ROOT, command_env

STOPPED = 75
# Gloo fails if processes first connect more than 30 seconds apart. On a busy machine this happens, because
# processes compile first. On a second start, the compilation cache is filled.
MET_TOO_LATE = "Gloo context initialization failed: DEADLINE_EXCEEDED"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_recipe(path: Path, corpus: Path, **changes) -> Path:
    """Writes a config file with the micro config, changed keys, and a mesh of all devices."""
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
    """Starts `count` processes of one job, with simulated devices each; only the last one gets `last`."""
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
    """Runs `launch/local.sh` to completion."""
    env = command_env() | {"XLA_FLAGS": FAST_COMPILATION}  # the script adds the number of devices
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
    """Ends a process if it is running; returns its stderr."""
    process.kill()
    return process.communicate()[1]
