"""Input patterns: paths, globs and saved datasets."""

import errno
import json
import os

import pytest

from dualsm.data import inputs
from dualsm.data.build import Recipe, build
from dualsm.process.errors import UserError
from tests.data.reading import read
from tests.data.test_build import texts_of


@pytest.mark.parametrize(
    "name", ["d[1].jsonl", "a,b.jsonl", "a *.jsonl", "~x.jsonl", "A.JSONL", "d[1]/e.jsonl"]
)
def test_existing_paths_are_not_globs(tmp_path, monkeypatch, name):
    (tmp_path / "d[1]").mkdir()
    for other in ("d1.jsonl", "a b.jsonl", "b.jsonl", name):
        (tmp_path / other).write_text(json.dumps({"text": other}))
    assert read(tmp_path / name) == [name]
    monkeypatch.chdir(tmp_path)
    assert read(name) == [name]
    if "," not in name:
        assert read(f"b.jsonl,{name}") == ["b.jsonl", name]
    if name.startswith("d[1]/"):
        assert read("d[1]/*.jsonl") == [name]


def test_tilde_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d.jsonl").write_text('{"text": "a"}')
    assert read("~/d.jsonl") == read("~/*.jsonl,~/d.jsonl") == ["a"]
    assert inputs.find_inputs("~/d.jsonl") == [str(tmp_path / "d.jsonl")]


def test_only_the_last_suffix_determines_the_format(tmp_path):
    folder = tmp_path / "books.jsonl.txts"
    folder.mkdir()
    (folder / "1.jsonl.txt").write_text("no JSON")
    assert read(folder / "*.txt") == ["no JSON"]


def test_an_empty_flag_is_reported(tmp_path, monkeypatch):
    """The empty path is not the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--input is empty"):
        inputs.find_inputs("")


def test_named_pipes_are_not_inputs(tmp_path):
    """A pipe could be read only once, and would block until another process writes to it."""
    os.mkfifo(tmp_path / "a.jsonl")
    for pattern in ("a.jsonl", "*.jsonl"):
        with pytest.raises(UserError, match="no files match"):
            inputs.find_inputs(str(tmp_path / pattern))


def test_a_folder_stands_for_its_input_files(tmp_path, capsys):
    names = ["a.jsonl", "sub/b.json", "sub/deep/c.txt", ".hidden/d.jsonl", "sub/.e.jsonl", "~f.jsonl"]
    for name in (*names, "README.md", "sub/g.jsonl.bak"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    found = inputs.find_inputs(str(tmp_path), quiet=False)
    assert found == [str(tmp_path / name) for name in names[:3]]
    assert "ignored files with other suffixes (2), such as README.md" in capsys.readouterr().out
    assert len(inputs.find_inputs(str(tmp_path), file_format="text")) == 5
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("text")
    with pytest.raises(UserError, match="contains no files with the suffixes .jsonl"):
        inputs.find_inputs(str(empty))


def write_inputs(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}))


def test_folders_behind_links_are_input(tmp_path, monkeypatch):
    """Each folder is read once, under its own path if that is in the input and not hidden."""
    write_inputs(tmp_path, "data/1.jsonl", "data/en/a.jsonl", "data/.store/h.jsonl", "elsewhere/deep/e.jsonl")
    links = {
        "part2": "../elsewhere",
        "part3": "../elsewhere/deep",
        "aa": "en",
        "loop": ".",
        "through": "1.jsonl/x",
        "self": "self",
        "nowhere": "x",
        "visible": ".store",
        ".store/out": "../../elsewhere",
        "en/up": "../..",
    }
    for name, target in links.items():
        os.symlink(target, tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    # The link data/en/up sorts before data/part2, and leads to elsewhere/ as well.
    expected = ["1.jsonl", "en/a.jsonl", "en/up/elsewhere/deep/e.jsonl", "visible/h.jsonl"]
    assert inputs.find_inputs("data") == [f"data/{name}" for name in expected]
    os.unlink("data/en/up")
    expected = ["1.jsonl", "en/a.jsonl", "part2/deep/e.jsonl", "visible/h.jsonl"]
    for pattern in ("data", f"{tmp_path}/data/", "da*"):
        assert [os.path.relpath(path, "data") for path in inputs.find_inputs(pattern)] == expected


def test_an_unreadable_folder_is_one_line(tmp_path, monkeypatch):
    write_inputs(tmp_path, "data/1.jsonl", "data/part2/a.jsonl", "data/.hidden/a.jsonl")
    write_inputs(tmp_path, "data/lost+found/a.jsonl")
    scandir, unreadable = os.scandir, {".hidden", "lost+found"}

    def refuse(path):  # root can read every folder
        if os.path.basename(path) in unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(inputs.find_inputs(str(tmp_path / "data"))) == 2
    unreadable.add("part2")
    expected = f"^cannot read the folder {tmp_path}/data/part2 .Permission denied.; check its permissions$"
    with pytest.raises(UserError, match=expected):
        inputs.find_inputs(str(tmp_path / "data"))


@pytest.mark.parametrize("folder", [".", "./", "data", "data/", "../{here}", "~"])
def test_names_in_a_folder_are_relative_to_it(tmp_path, monkeypatch, folder):
    root = tmp_path / "data" if folder.startswith("data") else tmp_path
    for name in ("1.jsonl", "a.jsonl", ".h/z.jsonl", ".i.jsonl", "sub/.j.jsonl", "sub/b.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"text": name}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(folder.format(here=tmp_path.name)) == ["1.jsonl", "a.jsonl", "sub/b.jsonl"]


def test_a_corpus_inside_of_its_input_is_not_input(tmp_path, monkeypatch, documents):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "sub/manifest"):
        (tmp_path / f"data/{name}.json").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"data/{name}.json").write_text(
            json.dumps([{"text": f"{name} {text}"} for text in documents[:40]])
        )
    made = [build(Recipe("data", vocab_size=384), "data/corpus", 1, quiet=True) for _ in range(2)]
    assert made[0] == made[1] and made[0]["files_read"] == 3
    assert len(inputs.find_inputs(".")) == 3
    with pytest.raises(UserError, match="--input: data/corpus is a corpus; pass the text"):
        inputs.find_inputs("data/corpus")


@pytest.mark.parametrize(
    "spelling", ["data/valid.txt", "./data/valid.txt", "data/../data/valid.txt", "data/*d.txt"]
)
def test_held_out_text_files_are_not_trained_on(tmp_path, monkeypatch, documents, spelling):
    """The only file of a flag is divided into paragraphs, unlike one of several files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        (tmp_path / f"data/{name}.txt").write_text("\n\n".join(f"#{name}# {text}" for text in documents[:60]))
    recipe = Recipe("data", valid_input=spelling, vocab_size=384)
    manifest = build(recipe, "out", 1, quiet=True)
    assert manifest["files_read"] == 2
    assert all("#valid#" not in text for text in texts_of("out", "train"))
    assert len(texts_of("out", "valid")) > 1
    with pytest.raises(UserError, match="--valid_input contains all files of --input=data/v"):
        build(Recipe("data/v*", valid_input=spelling, vocab_size=384), "none", 1, quiet=True)


def test_folders_that_a_glob_matches_stand_for_their_files(tmp_path, capsys):
    for name in ("a.jsonl", "en/b.jsonl", "en/deep/c.jsonl", "de/d.txt", "other/e.dat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    found = [os.path.relpath(path, tmp_path) for path in inputs.find_inputs(f"{tmp_path}/*", quiet=False)]
    assert found == ["a.jsonl", "de/d.txt", "en/b.jsonl", "en/deep/c.jsonl"]
    assert "ignored a folder: --input: " in capsys.readouterr().out
    assert len(inputs.find_inputs(f"{tmp_path}/??")) == 3
    assert len(inputs.find_inputs(f"{tmp_path}/**/*.jsonl")) == 3
    with pytest.raises(UserError, match="no files match"):
        inputs.find_inputs(f"{tmp_path}/oth*")
