"""Limits and errors of the operating system: open files, names, closed terminals, cores."""

import errno
import os
import pty
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dualsm.data.corpus import Corpus
from dualsm.process.errors import UserError, user_message
from tests.conftest import ROOT, command_env, run_command


@pytest.fixture
def file_limit():
    """Sets the soft limit of open files, and restores it at the end."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda count: resource.setrlimit(resource.RLIMIT_NOFILE, (count, old[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, old)


def test_corpus_with_more_shards_than_open_files_is_read(corpus_path, file_limit):
    documents = Corpus(str(corpus_path)).documents("train")
    expected = documents.read(range(len(documents)))
    file_limit(len(os.listdir("/proc/self/fd")) + 3)  # the corpus has eight shards
    documents = Corpus(str(corpus_path)).documents("train")
    for found, tokens in zip(documents.read(range(len(documents))), expected, strict=True):
        np.testing.assert_array_equal(found, tokens)


def test_hard_limit_of_open_files_is_reported(corpus_path, monkeypatch):
    """The hard limit is simulated, because a process cannot raise its hard limit again."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))
    with pytest.raises(
        UserError, match="8 shards, but .* at most 16 files; .*the hard limit .* to 72 .nofile"
    ):
        Corpus(str(corpus_path)).documents("train")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOSPC, "check free space"),
        (errno.ELOOP, "symbolic links"),
        (errno.ECONNRESET, "network"),
    ],
)
def test_errors_of_the_system_come_with_advice(number, advice):
    assert advice in user_message(OSError(number, os.strerror(number), "file"))


def test_too_long_name_is_one_line(corpus_path):
    flags = [f"--config=tests/micro.py:{corpus_path}", f"--workdir=/tmp/{'x' * 300}"]
    done = run_command("dualsm.train", *flags)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("choose a shorter name")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no taskset on this system")
def test_number_of_workers_equals_the_usable_cores():
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(own)})
    try:
        done = run_command("dualsm.prepare", "--helpshort")
        assert "--workers: number of processes (default: '1'" in " ".join(done.stdout.split())
    finally:
        os.sched_setaffinity(0, own)


def test_a_script_without_a_main_guard_raises(jsonl, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from dualsm.data.build import Recipe, build\n"
        f"build(Recipe(input={str(jsonl)!r}, vocab_size=512), {str(tmp_path / 'corpus')!r}, workers=2)\n"
    )
    done = run_command(str(script))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "exited with status 1" in last and '`if __name__ == "__main__":`' in last
    assert "memory" not in last
    assert not (tmp_path / "corpus").exists()


TERMINAL = """
import sys, time
from dualsm.process import distributed
from dualsm.process.progress import bar, say, warn

signals = []
if sys.argv[2] == "hangup":
    distributed.on_hangup(lambda: signals.append(1))
else:
    import signal
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    distributed.on_hangup(lambda: signals.append(1))
with bar(total=6000, mininterval=0) as progress:
    say("ready")
    for step in range(6000):  # a minute
        progress.update()
        say(f"step {step}")
        warn("warning")
        time.sleep(0.01)
        if signals or (sys.argv[2] == "ignored" and step == 300):
            break
open(sys.argv[1], "w").write(f"saved {len(signals)}")
"""


@pytest.mark.parametrize(("kind", "signals"), [("hangup", 1), ("ignored", 0)])
def test_closed_terminal_stops_the_run_after_saving(tmp_path, kind, signals):
    """Uses a real terminal. SIGHUP stops the run, unless it is ignored as with nohup."""
    code, saved = tmp_path / "code.py", tmp_path / "saved"
    code.write_text(TERMINAL)
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.execvpe(sys.executable, [sys.executable, str(code), str(saved), kind], command_env())
    seen = b""
    while b"step 3" not in seen:
        seen += os.read(master, 1024)
    os.close(master)
    start = time.monotonic()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > start + 60:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    assert saved.read_text() == f"saved {signals}"


@pytest.mark.parametrize("platforms", ["", "cpu"])
def test_a_gpu_that_jax_does_not_use_is_reported(platforms):
    """JAX looks for `/dev/nvidia0`, which machines without a GPU do not have: the check is replaced."""
    code = (
        "import jax\n"
        "from jax._src import hardware_utils\n"
        "from dualsm.process import cli\n"
        "hardware_utils.has_visible_nvidia_gpu = lambda: True\n"
        "def main(_):\n"
        "    cli.set_up_jax()\n"
        "    print(jax.default_backend())\n"
        "cli.run(main)\n"
    )
    environment = command_env() | {"JAX_PLATFORMS": platforms}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.stdout.split() == ["cpu"]
    assert ("pip install 'dualsm[cuda]'" in process.stderr) == (platforms == "")
