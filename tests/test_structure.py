"""The import graph: packages are stages in a fixed order, and the graph has no cycles."""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path

import dualsm

# Each package or top-level module imports only from itself and from earlier stages.
STAGES = [
    "process",
    "devices",
    "data",
    "objectives",
    "model",
    "optimizers",
    "config_keys",
    "config",
    "rundir",
    "training",
    "generation",
    "evaluation",
    "exchange",
    "aot",
    "sweeps",
    "analysis",
    "commands",  # all other top-level modules
]


@functools.cache
def imports() -> frozenset[tuple[str, str]]:
    """Returns all imports between modules of the package, also those inside functions."""
    root = Path(dualsm.__file__).parent
    modules = {_module_name(path.relative_to(root.parent)): path for path in root.rglob("*.py")}
    found = set()
    for importer, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [(alias.name, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
            else:
                continue
            imported = {name if name in modules else parent for name, parent in names}
            found |= {(importer, name) for name in imported & modules.keys() - {importer}}
    return frozenset(found)


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _stage(module: str) -> int:
    """Returns the position of a module's stage."""
    if module == "dualsm":  # contains only the version
        return -1
    name = module.split(".")[1]
    return STAGES.index(name if name in STAGES else "commands")


def test_every_package_is_a_stage():
    root = Path(dualsm.__file__).parent
    packages = {path.parent.name for path in root.glob("*/__init__.py")}
    assert packages <= set(STAGES)


def test_file_names_are_unique():
    names = [path.name for path in Path(dualsm.__file__).parent.rglob("*.py") if path.stem[:2] != "__"]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)


def test_no_package_imports_from_a_later_stage():
    upward = {(a, b) for a, b in imports() if _stage(b) > _stage(a)}
    assert upward == set()


def test_the_import_graph_has_no_cycles():
    graph: dict[str, set[str]] = {}
    for importer, imported in imports():
        graph.setdefault(importer, set()).add(imported)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_imports_are_found():
    """Imports of modules, of names from modules, and inside functions are part of the graph."""
    assert ("dualsm.train", "dualsm.process.cli") in imports()
    assert ("dualsm.process.cli", "dualsm.process.errors") in imports()
    assert ("dualsm.evaluation.harness", "dualsm.process.cli") in imports()
