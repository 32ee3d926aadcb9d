"""Output folders are complete or absent, even if processes die."""

import multiprocessing
import os
import signal
import time

import pytest

from dualsm.process.errors import UserError
from dualsm.process.output import new_folder


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(target, part="part") -> None:
    with new_folder(target, "--output", last="part") as aside:
        (aside / "part").write_text(part)


def write_for_long(target) -> None:
    with new_folder(target, "--output", last="part") as aside:
        (aside / "part").touch()
        time.sleep(60)


@pytest.fixture
def writer(tmp_path):
    """Starts a process that writes the folder "a b[1]"."""
    process = multiprocessing.get_context("spawn").Process(target=write_for_long, args=(tmp_path / "a b[1]",))
    process.start()
    while not list(tmp_path.glob(".a b*/part")):
        time.sleep(0.01)
        assert process.is_alive()
    yield process
    process.kill()
    process.join()


def test_temporary_folders_of_dead_processes_are_removed(tmp_path, writer):
    target = tmp_path / "a b[1]"
    (aside,) = tmp_path.iterdir()
    write(tmp_path / "a b1")  # matches the glob "a b[1]"
    write(target)
    assert names(tmp_path) == sorted([aside.name, target.name, "a b1"])
    assert names(target) == ["part"]

    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert aside.exists()
    with pytest.raises(UserError, match="already exists"):
        write(target)
    assert names(tmp_path) == sorted([target.name, "a b1"])


def test_failure_leaves_no_files(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "deep" / "a", "--output", last="part") as aside:
        (aside / "part").touch()
        raise RuntimeError
    assert names(tmp_path / "deep") == []


def test_two_processes_that_write_the_same_folder(tmp_path):
    """The first to finish creates the folder; the other fails and leaves no files."""
    target = tmp_path / "a"
    with pytest.raises(UserError, match="already exists"), new_folder(target, "--output", last="part"):
        write(target, "first")
    assert names(tmp_path) == ["a"]
    assert (target / "part").read_text() == "first"


def test_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="^--output=.*file/a cannot be created"):
        write(tmp_path / "file" / "a")
