"""Damaged input is read or rejected in one line; benchmarks/fuzz.py runs more cases."""

import pytest

from tests.fuzzing import attempts
from tests.fuzzing.artifacts import Target
from tests.fuzzing.attempts import Hang, fuzz
from tests.fuzzing.commands import run_damaged
from tests.fuzzing.corpora import FORMATS
from tests.fuzzing.targets import make_targets
from tests.fuzzing.tasks import TASK_FILES

pytestmark = pytest.mark.slow

CASES = 12
NAMES = (
    "corpus", "corpus, by its hashes", "prepare, new tokenizer", *(f"prepare {form}" for form in FORMATS),
    "encodings", "compressions", "odd paths", "odd JSON", "hidden files",
    *(f"task {name}" for name in TASK_FILES), "tokenizer.model", "tokenizer.json", "prompts",
    "table of a sweep", "folder of a sweep", "released weights", "run", "config of a run",
    "config on the command line",
)  # fmt: skip


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


@pytest.fixture(scope="module")
def targets(scratch):
    return make_targets(scratch)


def test_all_targets_are_fuzzed(targets):
    assert set(targets) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_rejected(targets, name):
    target = targets[name]
    fuzz(target, max(2, round(CASES * target.share)))


@pytest.mark.parametrize("name", ["prepare", "recommend", "convert"])  # the benchmark runs all commands
def test_commands_reject_damaged_files_in_one_line(targets, scratch, name):
    run_damaged(name, scratch, seed=0)


def test_fuzzer_detects_tracebacks_and_hangs(monkeypatch):
    def careless(folder):
        if b"\0" in (folder / "a").read_bytes():
            raise ValueError("a traceback")

    def endless(folder):
        while (folder / "a").read_bytes() != b"whole":
            pass

    with pytest.raises((ValueError, FileNotFoundError, ExceptionGroup)):
        fuzz(Target({"a": b"whole"}, careless), 200)
    monkeypatch.setattr(attempts, "SECONDS", 0.05)
    with pytest.raises((Hang, FileNotFoundError, BaseExceptionGroup)):
        fuzz(Target({"a": b"whole"}, endless), 20)
