"""The lock of the run directory."""

import contextlib
import signal
import subprocess
import sys

import jax
import pytest

from dualsm.process.errors import UserError
from dualsm.rundir.workdir import CONFIG, check_config_of_run, lock, read_config, write_config
from dualsm.training import loop, start
from tests.conftest import ROOT, command_env

HOLD = """
import sys, time
from dualsm.rundir.workdir import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_run_is_rejected_and_names_the_first(tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)],
        cwd=ROOT, env=command_env(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {process.pid} on"), lock(workdir):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock(workdir):  # the lock was released when the process died
            pass
    finally:
        process.kill()
        process.stdout.close()


def test_training_locks_its_workdir(micro, tmp_path):
    from dualsm.training.loop import train

    micro.mesh.data = -1
    workdir = tmp_path / "run"
    with lock(workdir), pytest.raises(UserError, match="is in use by process"):
        train(micro, workdir)
    assert not (workdir / CONFIG).exists()
    refused = []

    def stop(step):
        with pytest.raises(UserError, match="is in use"), lock(workdir):
            pass
        refused.append(step)
        return step == 1

    assert not train(micro, workdir, stop)
    assert refused[-1] == 1
    with lock(workdir):
        pass


CLAIM = """
import os, signal, sys
from pathlib import Path
from dualsm.data.corpus import Corpus
from dualsm.rundir.workdir import write_config
from tests.micro import micro_config

corpus = Corpus(sys.argv[1])
for moment in range(100):
    child = os.fork()
    if child == 0:
        workdir, seen = Path(sys.argv[2]) / str(moment), []

        def kill(event, arguments):
            if any(str(workdir) in str(argument) for argument in arguments):
                seen.append(event)
                if len(seen) > moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        write_config(workdir, micro_config(), corpus)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_workdir_stays_usable_if_its_first_run_is_killed(corpus, corpus_path, tmp_path):
    """Kills the run before each of its accesses to the directory in turn."""
    from dualsm.rundir.workdir import epath
    from tests.micro import micro_config

    done = subprocess.run(
        [sys.executable, "-c", CLAIM, str(corpus_path), str(tmp_path)],
        cwd=ROOT, env=command_env(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    moments = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    assert len(moments) >= 5  # creates the folder, then writes and renames two files
    for path in moments:
        check_config_of_run(epath.Path(path), micro_config())
        write_config(epath.Path(path), micro_config(), corpus)
        assert sorted(p.name for p in path.iterdir()) == [CONFIG, "tokenizer.model"]


def test_run_that_starts_first_is_kept(micro, corpus, tmp_path, monkeypatch):
    """Another run starts between the first check of the directory and the lock."""
    other = micro.copy_and_resolve_references()
    other.seed, other.data.identity = 7, corpus.identity

    @contextlib.contextmanager
    def late(workdir):
        write_config(workdir, other, corpus)
        with lock(workdir):
            yield

    monkeypatch.setattr(start, "lock", late)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    with pytest.raises(UserError, match="contains a run with another config .*seed: 7 -> 0"):
        loop.train(micro, tmp_path)
    assert read_config(tmp_path).seed == 7
