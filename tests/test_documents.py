"""Files, headings, commands, flags and config keys that documents name exist; imports of benchmarks exist."""

import ast
import csv
import importlib
import importlib.util
import os
import platform
import re
import tomllib
from fractions import Fraction
from importlib.metadata import version

import pytest

import dualsm
from dualsm.config import add_source, default_config
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
# Flags of lm_eval's command line and of the launch scripts.
OTHERS = {"help", "dry-run", "model", "model_args", "tasks", "include_path", "output_path"}
FOLDERS = "benchmarks|configs|docs|dualsm|launch|notebooks|tests"

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def code(text: str) -> list[str]:
    """Returns the code in a document: lines of blocks, with continuation lines joined, and spans."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def defined_flags(path) -> set[str]:
    """Returns the flags that a module defines, without importing it."""
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
def test_link_targets_exist(document):
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
    for line in " && ".join(code(document.read_text())).split(" && "):
        line = line.strip()
        command = re.search(
            r"python (?:-m (dualsm[\w.]*)|((?:benchmarks|launch)/\w+\.py))(?=\s|$)"
            r"|^(?:\$ )?dualsm +([a-z]+)(?=\s|$)",
            line,
        )
        if not command:
            continue
        module, script, name = command.groups()
        path = ROOT / script if script else source(module or f"dualsm.{name}")
        assert path.exists(), line
        if module != "dualsm.evaluation.harness":
            assert named_flags(line[command.end() :]) <= defined_flags(path) | {"config"}, line


@documents
def test_flags_exist(document):
    folders = ("dualsm", "benchmarks", "launch")
    modules = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    known = OTHERS.union(*map(defined_flags, modules))
    for line in code(document.read_text()):
        if line.startswith("--"):
            assert named_flags(line) <= known, line


@documents
def test_config_keys_exist(document):
    """Checks `config.a.b`, and `a.b` if `a` is a section of the config."""
    default = default_config()
    for name in ("small", "large"):  # the sources of the examples
        add_source(default, name)
    for line in code(document.read_text()):
        for prefix, key in re.findall(r"(?<![\w./])(config\.)?([a-z_]+(?:\.[a-z_0-9]+)*)", line):
            parts = key.split(".")
            if parts[-1] in ("json", "py", "safetensors"):
                continue
            if not (prefix or (parts[0] in default and parts[1:])):
                continue
            place = default
            for part in parts:
                assert part in place, prefix + key
                place = place[part]


def test_readme_is_short_and_links_every_page():
    readme = (ROOT / "README.md").read_text()
    assert all(f"(docs/{path.name})" in readme for path in PAGES)
    assert len(readme.split()) < 1100  # tables, commands and the figure of the views included


def test_the_table_of_acceptance_has_the_numbers_of_its_csv():
    text = (ROOT / "docs" / "decoding.md").read_text()
    with (ROOT / "docs" / "decoding" / "acceptance.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = {}
    for row in sorted(rows, key=lambda row: int(row["draft"])):
        alpha = str(Fraction(float(row["alpha"])))
        losses = [f"{float(row[name]):.3f}" for name in ("causal_loss", "masked_loss")]
        sampling = {"greedy": "greedy", "sampled": "temperature 1"}[row["sampling"]]
        start = (row["repetitions"], alpha, f"{float(row['weight_decay']):g}", *losses, sampling)
        value = f"{float(row['accepted']):.3f} ± {float(row['stderr']):.3f}"
        lines.setdefault(start, []).append(value)
    assert len(lines) == 24 and all(len(values) == 4 for values in lines.values())
    for start, values in lines.items():
        assert f"| {' | '.join([*start, *values])} |\n" in text


def test_the_table_of_tail_sequences_has_the_numbers_of_its_csv():
    text = (ROOT / "docs" / "decoding.md").read_text()
    with (ROOT / "docs" / "decoding" / "tail.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        weight = "" if row["weight"] == "1" else f", `weight={row['weight']}`"
        share = f"{float(row['share']):.0%}" if float(row["share"]) else "0"
        found = (f"{row[name]} ± {row[f'{name}_stderr']}" for name in ("greedy", "sampled"))
        cells = [f"{share}{weight}", row["causal_loss"], row["masked_loss"], *found]
        assert f"| {' | '.join(cells)} |" in text
    assert len(rows) == 5


def test_citation_has_the_version_of_the_package():
    (version,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert version == dualsm.__version__


def test_github_workflow_runs_the_checks_on_the_pythons_of_the_readme():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (script,) = re.findall(r"- run: (.*)$", workflow, re.M)
    assert os.access(ROOT / script, os.X_OK)
    (listed,) = re.findall(r"python: \[(.*)\]", workflow)
    assert [version.strip('" ') for version in listed.split(",")] == list(versions_tested())


def test_the_readme_names_the_oldest_and_newest_versions_and_the_installed_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (oldest, end) = re.findall(r"^jax>=(0\.\d+),<(0\.\d+)$", "\n".join(project["dependencies"]), re.M)[0]
    tested = versions_tested()
    assert project["requires-python"] == ">=" + min(tested)
    assert (min(tested.values()), max(tested.values())) == (oldest, f"0.{int(end[2:]) - 1}")
    python, installed = (".".join(v.split(".")[:2]) for v in (platform.python_version(), version("jax")))
    assert tested.get(python, installed) == installed


def versions_tested() -> dict[str, str]:
    """Returns the version of JAX for each version of Python that the README calls tested."""
    return dict(re.findall(r"Python (3\.\d+) and JAX (0\.\d+)", (ROOT / "README.md").read_text()))


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_imports_of_benchmarks_exist(script):
    """Most benchmarks take too long to run in a test."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dualsm"):
            for name in node.names:
                there = hasattr(importlib.import_module(node.module), name.name)
                assert there or importlib.util.find_spec(f"{node.module}.{name.name}"), name.name
