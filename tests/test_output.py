"""Output files are written atomically; invalid paths are rejected before the work."""

import errno
import os
from pathlib import Path

import pytest

from dualsm.process import paths
from dualsm.process.errors import UserError, user_message
from dualsm.process.output import check_empty, check_output, new_folder, write_output


def test_a_file_and_its_folder_are_created(tmp_path):
    path = tmp_path / "a" / "b.json"
    check_output(path, "--output")
    for text in ("first", "second"):
        write_output(path, text, "--output")
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_as_output_is_an_error_and_leaves_no_files(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="^--output=.* is a folder"):
        check_output(tmp_path / "a", "--output")
    with pytest.raises(UserError, match="^--output: cannot write"):
        write_output(tmp_path / "a", "text", "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_as_parent_folder_is_an_error(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="^--output: cannot create the folder"):
        check_output(tmp_path / "a" / "b.json", "--output")
    with pytest.raises(UserError, match="^--output: cannot write"):
        write_output(tmp_path / "a" / "b.json", "text", "--output")


@pytest.mark.parametrize("name", ["notes~", ".hidden", "file"])
def test_a_folder_with_any_file_is_not_empty(tmp_path, name):
    check_empty(tmp_path, "--output")
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="^--output=.* already exists"):
        check_empty(tmp_path, "--output")


def write_folder(target, started=None) -> None:
    """Writes a folder with a file; appends to the list `started` when the work starts."""
    with new_folder(target, "--output", last="part") as folder:
        if started is not None:
            started.append(target)
        (folder / "part").write_text("complete")


@pytest.mark.parametrize("exists", [True, False], ids=["empty", "dangling"])
def test_the_folder_that_a_link_names_is_created(tmp_path, monkeypatch, exists):
    monkeypatch.chdir(tmp_path)
    if exists:
        (tmp_path / "disk" / "real").mkdir(parents=True)
    os.symlink("disk/real", "link")
    write_folder(Path("link"))
    assert os.path.islink("link") and os.listdir("disk/real") == ["part"]
    assert os.listdir("disk") == ["real"] and sorted(os.listdir()) == ["disk", "link"]
    with pytest.raises(UserError, match="^--output=.*link already exists"):
        write_folder(Path("link"))


def test_links_that_point_at_each_other_are_rejected_before_the_work(tmp_path):
    started = []
    os.symlink("b", tmp_path / "a")
    os.symlink("a", tmp_path / "b")
    with pytest.raises(UserError, match="^--output=.*a cannot be created .*symbolic links"):
        write_folder(tmp_path / "a", started)
    assert not started


def test_mount_points_are_rejected_before_the_work(tmp_path, monkeypatch):
    mounted, started = tmp_path / "mounted", []
    mounted.mkdir()
    os.symlink(mounted, tmp_path / "link")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(mounted))
    for target in (mounted, tmp_path / "link"):
        with pytest.raises(UserError, match=f"^--output={target} is a mount point; name a folder in it$"):
            write_folder(target, started)
        with pytest.raises(UserError, match="is a mount point"):
            check_empty(target, "--workdir")
    assert not started
    write_folder(mounted / "inside")
    assert os.listdir(mounted) == ["inside"]


def test_a_complete_folder_that_cannot_be_renamed_is_kept(tmp_path, monkeypatch):
    """The next call with the same target does not remove it either."""
    rename, target = Path.rename, tmp_path / "a"

    def fail(path, new):
        if new == target:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return rename(path, new)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(UserError) as caught:
            write_folder(target)
    (kept,) = tmp_path.iterdir()
    busy = os.strerror(errno.EBUSY)
    assert str(caught.value) == (
        f"--output={target} cannot be created: {busy}; the complete folder is {kept}, rename it"
    )
    write_folder(target)
    assert os.listdir(kept) == os.listdir(target) == ["part"]


def test_a_busy_path_is_one_line():
    error = OSError(errno.EBUSY, os.strerror(errno.EBUSY), "corpus")
    assert user_message(error).endswith("'corpus'; the path is a mount point or in use; choose another")


def test_a_real_path_in_a_folder_named_like_a_bucket_stays_local():
    """etils reads /gs/x as gs://x."""
    assert str(paths.real_path("/gs/x/../y")) == "//gs/y"
