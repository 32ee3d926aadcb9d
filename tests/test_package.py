"""The installed package: console script, list of commands, configs."""

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


def test_commands_run_by_name(jsonl, tmp_path):
    """`prepare` starts worker processes, which import the main module again."""
    corpus = tmp_path / "corpus"
    process = run_command(
        "dualsm", "prepare", f"--input={jsonl}", f"--output={corpus}", "--vocab_size=384", "--workers=2"
    )
    assert process.returncode == 0, process.stderr
    assert (corpus / "tokenizer.model").exists()


def test_unknown_command_is_rejected():
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
def test_missing_config_is_rejected(name):
    with pytest.raises(UserError, match="choose one of: .*dual_470m, .*tiny"):
        find_configs([f"--config=dualsm:{name}"])


def test_installed_package_contains_the_configs(tmp_path):
    """Builds the package with pip, and runs it outside the checkout."""
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
    # The command found the config: it fails later, because the corpus is missing.
    assert "config.data.path: no corpus at 'runs/corpus'" in process.stderr, process.stderr
    assert (built / "dualsm" / "exchange" / "remote" / "modeling_dualsm.py").exists()
    data = [{path.name for path in (root / "dualsm").rglob("*.csv")} for root in (ROOT, built)]
    assert data[0] == data[1] != set()
