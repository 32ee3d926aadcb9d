"""Evaluation results of a checkpoint, a JSON file in the run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping

from etils import epath

from dualsm.process.errors import UserError


def results_file(workdir: epath.Path, step: int, parameters: str = "last") -> epath.Path:
    """Returns the path of the results of a checkpoint, or of its moving average (`parameters` "ema")."""
    folder = workdir / "eval"
    return (folder if parameters == "last" else folder / parameters) / f"step_{step}.json"


def read_results(path: epath.Path) -> dict:
    """Reads a results file of `dualsm.evaluate`; returns {} if it does not exist.

    Raises:
      UserError: if the file is not a results file.
    """
    try:
        results = json.loads(path.read_text())
        measured = [*results.get("tasks", {}).values(), results.get("held_out", {})]
        if not all(isinstance(result, dict) for part in measured for result in part.values()):
            raise ValueError("a result is not an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a results file of dualsm.evaluate ({error}); move it or choose another --output"
        ) from error
    return results


def merge(old: Mapping, new: Mapping) -> dict:
    """Merges new results of a checkpoint into old ones.

    A new result replaces the old result of the same task and mode, or of the same objective on held-out text.
    A new `acceptance` or `infilling` replaces the old one. Each result contains its own settings.
    """
    tasks = {name: dict(modes) for name, modes in old.get("tasks", {}).items()}
    for name, modes in new["tasks"].items():
        tasks[name] = tasks.get(name, {}) | modes
    held_out = old.get("held_out", {}) | new.get("held_out", {})
    single = {name: new.get(name, old.get(name)) for name in ("acceptance", "infilling")}
    return {
        **new,
        "tasks": tasks,
        **({"held_out": held_out} if held_out else {}),
        **{name: result for name, result in single.items() if result},
    }
