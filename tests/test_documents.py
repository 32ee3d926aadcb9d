"""What documents name exists: files, headings, commands, their flags, config keys; and benchmarks import."""

import ast
import importlib
import importlib.util
import re

import pytest

from dualsm.config import default_config
from tests.conftest import ROOT

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# Flags of lm_eval's command line and of the launch scripts.
OTHERS = {"help", "dry-run", "model", "model_args", "tasks", "include_path", "output_path"}
FOLDERS = "benchmarks|configs|docs|dualsm|launch|notebooks|tests"

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def code(text: str) -> list[str]:
    """What stands in a document as code: lines of blocks (continued ones joined), and spans."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def defined_flags(path) -> set[str]:
    """The flags that a module defines, read without running it."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {
        call.args[0].value
        for call in calls
        if getattr(call.func, "attr", "").startswith("DEFINE_") and isinstance(call.args[0], ast.Constant)
    }
    return names | {"help"} if names else set()


def named_flags(line: str) -> set[str]:
    return set(re.findall(r"(?:^|[\s'])--([A-Za-z][\w-]*)", line))


def source(module: str):
    path = ROOT / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


@documents
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if heading else []
        slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
        assert not heading or heading in slugs, target


@documents
def test_files_exist(document):
    for line in code(document.read_text()):
        for name in re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\w)(?![\w/*<]|\S*://)", line):
            assert (ROOT / name).exists() or list(ROOT.glob(f"{name}*")), name


@documents
def test_commands_have_their_flags(document):
    for line in code(document.read_text()):
        command = re.search(r"python (?:-m (dualsm[\w.]*)|(benchmarks/\w+\.py))(?=\s|$)", line)
        if not command:
            continue
        path = source(command[1]) if command[1] else ROOT / command[2]
        assert path.exists(), line
        if command[1] != "dualsm.evaluation.harness":
            assert named_flags(line[command.end() :]) <= defined_flags(path) | {"config"}, line


@documents
def test_flags_exist(document):
    modules = [*(ROOT / "dualsm").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    known = OTHERS.union(*map(defined_flags, modules))
    for line in code(document.read_text()):
        if line.startswith("--"):
            assert named_flags(line) <= known, line


@documents
def test_config_keys_exist(document):
    """`config.a.b`, and `a.b` where `a` is one of the config's parts."""
    default = default_config()
    for line in code(document.read_text()):
        for prefix, key in re.findall(r"(?<![\w./])(config\.)?([a-z_]+(?:\.[a-z_0-9]+)*)", line):
            parts = key.split(".")
            if parts[-1] in ("json", "py") or not (prefix or (parts[0] in default and parts[1:])):
                continue
            place = default
            for part in parts:
                assert part in place, prefix + key
                place = place[part]


def test_every_page_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert all(f"(docs/{path.name})" in readme for path in DOCUMENTS[1:] if path.parent.name == "docs")
    assert len(readme.splitlines()) < 300


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_what_a_benchmark_imports_is_there(script):
    """Most of them take too long to run here."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dualsm"):
            for name in node.names:
                there = hasattr(importlib.import_module(node.module), name.name)
                assert there or importlib.util.find_spec(f"{node.module}.{name.name}"), name.name
