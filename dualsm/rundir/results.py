"""The file with the evaluation results of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dualsm.process.errors import UserError


def results_file(workdir: Path, step: int) -> Path:
    """Where a run keeps the results of a checkpoint."""
    return workdir / "eval" / f"step_{step}.json"


def read_results(path: Path) -> dict:
    """The results in a file of `dualsm.evaluate`; {} when there is none.

    Raises:
      UserError: when it is damaged or something else.
    """
    try:
        results = json.loads(path.read_text())
        measured = [*results.get("tasks", {}).values(), results.get("held_out", {})]
        if not all(isinstance(result, dict) for part in measured for result in part.values()):
            raise ValueError("a result is no object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is no file of dualsm.evaluate ({error}); move it away, or choose another --output"
        ) from error
    return results


def merge(old: Mapping, new: Mapping) -> dict:
    """Results of one checkpoint with newer ones, which take the place of the same task and mode, and of the
    same objective on held-out text. Each says by its own settings how it was measured."""
    tasks = {name: dict(modes) for name, modes in old.get("tasks", {}).items()}
    for name, modes in new["tasks"].items():
        tasks[name] = tasks.get(name, {}) | modes
    held_out = old.get("held_out", {}) | new.get("held_out", {})
    return {**new, "tasks": tasks, **({"held_out": held_out} if held_out else {})}
