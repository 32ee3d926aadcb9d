"""What an evaluation is asked for, and the file that keeps the results of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dualsm.evaluation.modes import MODES
from dualsm.evaluation.tasks import TASKS
from dualsm.process.errors import UserError

HELD_OUT = "valid"  # the task that is no file of questions
# What a mode is on held-out text.
OBJECTIVES = {
    "causal": "causal",
    "prefix": "prefix",
    "masked": "masked_diffusion",
    "monte_carlo": "masked_diffusion",
}


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """What an evaluation is asked for.

    Attributes:
      tasks: `HELD_OUT` or of `TASKS`.
      modes: of `MODES`.
      task_data: folder with the tasks' files.
      limit: items a task; 0: all.
    """

    tasks: Sequence[str]
    modes: Sequence[str]
    task_data: str = ""
    limit: int = 0

    def check(self) -> None:
        """Raises `UserError`, naming the flag, for what cannot be evaluated."""
        if not self.tasks:
            raise UserError(f"--tasks= must name one or more of {HELD_OUT}, {', '.join(TASKS)}")
        if not self.modes:
            raise UserError(f"--modes= must name one or more of {', '.join(MODES)}")
        for mode in self.modes:
            if mode not in MODES:
                raise UserError(f"--modes: {mode!r} is none of {', '.join(MODES)}")
        for task in self.tasks:
            if task != HELD_OUT and task not in TASKS:
                raise UserError(f"--tasks: {task!r} is none of {HELD_OUT}, {', '.join(TASKS)}")
            if task != HELD_OUT and not self.task_data:
                raise UserError(f"--tasks={task} needs --task_data=FOLDER with {task}/*.jsonl in it")

    def objectives(self) -> list[str]:
        """What the modes are on held-out text, each once."""
        return list(dict.fromkeys(OBJECTIVES[mode] for mode in self.modes))

    def answered_by(self, results: Mapping) -> bool:
        """Whether results hold every task in every mode, on as many items as asked for."""
        tasks, held_out = results.get("tasks", {}), results.get("held_out", {})
        if HELD_OUT in self.tasks and not all(name in held_out for name in self.objectives()):
            return False
        return all(
            tasks.get(task, {}).get(mode, {}).get("limit") == self.limit
            for task in self.tasks
            for mode in self.modes
            if task != HELD_OUT
        )


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
