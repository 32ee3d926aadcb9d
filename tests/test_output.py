"""Output files are written atomically; invalid paths are rejected before the work."""

import pytest

from dualsm.process.errors import UserError
from dualsm.process.output import check_empty, check_output, write_output


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
