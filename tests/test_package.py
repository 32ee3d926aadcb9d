"""What can be run without a clone: the list of commands, and configs inside the package."""

import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint

import pytest

from dualsm.__main__ import commands, main
from dualsm.process.cli import find_configs
from dualsm.process.errors import UserError
from tests.conftest import ROOT, command_env, run_command


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_package_lists_its_commands(arguments):
    process = run_command("dualsm", *arguments)
    assert process.returncode == 0, process.stderr
    for name in ("prepare", "train", "evaluate", "sample", "convert"):
        assert f"  dualsm {name} " in process.stdout
    assert "dualsm cli" not in process.stdout
    assert all(purpose.endswith((".", ":")) for purpose in commands().values())


def test_the_console_script_is_the_main_function():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (name, target), *others = project["scripts"].items()
    assert (name, others) == ("dualsm", [])
    assert EntryPoint(name, target, "console_scripts").load() is main


def test_a_command_runs_by_its_name(jsonl, tmp_path):
    """`prepare` starts worker processes, which import the main module again."""
    corpus = tmp_path / "corpus"
    process = run_command(
        "dualsm", "prepare", f"--input={jsonl}", f"--output={corpus}", "--vocab_size=384", "--workers=2"
    )
    assert process.returncode == 0, process.stderr
    assert (corpus / "tokenizer.model").exists()


def test_an_unknown_command_is_refused():
    process = run_command("dualsm", "trian", "--help")
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("error: unknown command 'trian'; choose one of: compile, convert, ")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--config=dualsm:tiny"], ["train", "--config={folder}/tiny.py"]),
        (["--config=dualsm:tiny:alpha=0.5"], ["--config={folder}/tiny.py:alpha=0.5"]),
        (["-config", "dualsm:tiny"], ["-config", "{folder}/tiny.py"]),
        (["--config=configs/tiny.py:alpha=1"], ["--config=configs/tiny.py:alpha=1"]),
        (["--other=dualsm:tiny", "dualsm:tiny"], ["--other=dualsm:tiny", "dualsm:tiny"]),
    ],
)
def test_configs_are_found_in_the_package(arguments, expected):
    assert find_configs(arguments) == [argument.format(folder=ROOT / "configs") for argument in expected]


@pytest.mark.parametrize("name", ["nope", "", "../setup"])
def test_a_config_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match="choose one of: dual_470m, .*tiny"):
        find_configs([f"--config=dualsm:{name}"])


def test_an_installed_package_brings_its_configs(tmp_path):
    """Built as pip builds it, and run from a place where there is no clone."""
    source, built = tmp_path / "source", tmp_path / "built"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "dualsm", "configs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", f"--build-lib={built}"],
        cwd=source, check=True, capture_output=True,
    )  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-m", "dualsm.train", "--config=dualsm:tiny", "--workdir=run"],
        cwd=tmp_path, capture_output=True, text=True, env=command_env() | {"PYTHONPATH": str(built)},
    )  # fmt: skip
    # It found the config, and so came as far as missing the corpus.
    assert "no corpus at 'runs/corpus'" in process.stderr, process.stderr
    assert (built / "dualsm" / "exchange" / "remote" / "modeling_dualsm.py").exists()
