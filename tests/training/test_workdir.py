"""The lock of the run directory."""

import contextlib
import json
import signal
import subprocess
import sys

import jax
import pytest

from dualsm.data.sequence_order import ORDER_VERSION
from dualsm.process.errors import UserError
from dualsm.rundir.workdir import CONFIG, check_config_of_run, lock, read_config, write_config
from dualsm.training import loop, run_corpora, start
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


def test_a_run_in_the_order_of_an_earlier_version_cannot_resume(micro, corpus, tmp_path):
    """Earlier versions did not write `data.order_version`."""
    config = start.complete(micro, run_corpora.open_corpora(micro))
    assert config.data.order_version == ORDER_VERSION
    write_config(tmp_path, config, corpus)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    check_config_of_run(tmp_path, config)
    saved = json.loads((tmp_path / CONFIG).read_text())
    del saved["data"]["order_version"]
    (tmp_path / CONFIG).write_text(json.dumps(saved))
    with pytest.raises(
        UserError,
        match=rf"was trained in version 0 of the order of documents, .*has version {ORDER_VERSION}; ",
    ):
        check_config_of_run(tmp_path, config)
    read_config(tmp_path)  # for example to evaluate the run
    (tmp_path / "checkpoints" / "4").rename(tmp_path / "checkpoints" / "0")
    check_config_of_run(tmp_path, config)  # imported weights, which have seen no document


def test_another_version_of_the_order_is_rejected(micro):
    micro.data.order_version = 1
    with pytest.raises(
        UserError, match=f"order_version=1 is not the version .*{ORDER_VERSION}; leave it at 0"
    ):
        start.complete(micro, run_corpora.open_corpora(micro))
