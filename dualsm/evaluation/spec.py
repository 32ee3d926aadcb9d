"""Evaluation spec: tasks, modes and options of one evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from dualsm.evaluation.baselines import BASELINES
from dualsm.evaluation.modes import MODES
from dualsm.evaluation.tasks import TASKS
from dualsm.generation.speculative import MAX_DRAFT
from dualsm.process.errors import UserError

HELD_OUT = "valid"  # the task that scores the corpus's held-out text
# Objective whose held-out loss is reported for each mode.
OBJECTIVES = {
    "causal": "causal",
    "prefix": "prefix",
    "masked": "masked_diffusion",
    "monte_carlo": "masked_diffusion",
}


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """Tasks, modes and options of one evaluation.

    Attributes:
      tasks: names from `TASKS`, or `HELD_OUT`.
      modes: names from `MODES`.
      task_data: folder with the tasks' files.
      limit: maximum number of questions per task; 0: all.
      masks: numbers of masks that the mode "masked" averages over.
      samples: draws per item of the mode "monte_carlo".
      valid_samples: draws per packed sequence of held-out text.
      by_document: True adds the sums of each document of held-out text to the results.
      data: corpus with the held-out text; empty for the corpus that the run was trained on.
      baselines: names from `BASELINES`.
      draft: tokens per draft, to measure acceptance on held-out text; 0: not measured.
      infill_words: words of held-out text to fill in, in a mode with masks; 0: not measured.
    """

    tasks: Sequence[str]
    modes: Sequence[str]
    task_data: str = ""
    limit: int = 0
    masks: Sequence[int] = (1, 4)
    samples: int = 128
    valid_samples: int = 4
    data: str = ""
    baselines: Sequence[str] = ()
    draft: int = 8
    infill_words: int = 256
    by_document: bool = False

    def check(self) -> None:
        """Checks the names, and that every option that a task needs is set.

        Raises:
          UserError: if the evaluation is impossible; the message names the flag.
        """
        if not self.tasks:
            raise UserError(f"--tasks= is empty; choose from {HELD_OUT}, {', '.join(TASKS)}")
        if not self.modes:
            raise UserError(f"--modes= is empty; choose from {', '.join(MODES)}")
        if not 0 <= self.draft <= MAX_DRAFT:
            raise UserError(f"--draft={self.draft} must be in [0, {MAX_DRAFT}]; 0 skips the acceptance")
        if self.infill_words < 0:
            raise UserError(f"--infill_words={self.infill_words} must be at least 0; 0 skips the infilling")
        for mode in self.modes:
            if mode not in MODES:
                raise UserError(f"--modes: unknown mode {mode!r}; choose from {', '.join(MODES)}")
        for task in self.tasks:
            if task != HELD_OUT and task not in TASKS:
                raise UserError(f"--tasks: unknown task {task!r}; choose from {HELD_OUT}, {', '.join(TASKS)}")
            if task != HELD_OUT and not self.task_data:
                raise UserError(f"--tasks={task} needs --task_data=FOLDER with {task}/*.jsonl in it")
        for name in self.baselines:
            if name not in BASELINES:
                raise UserError(f"--baselines: unknown baseline {name!r}; choose from {', '.join(BASELINES)}")
        self._check_effects()

    def _check_effects(self) -> None:
        """Raises `UserError` for an option that is set but that none of the tasks and modes uses."""
        held_out, questions = HELD_OUT in self.tasks, bool(self.question_tasks())
        for needed, is_used, options in (
            (
                f"--tasks={HELD_OUT}",
                held_out,
                ("data", "valid_samples", "draft", "infill_words", "by_document"),
            ),
            ("a task with questions in --tasks", questions, ("task_data", "limit", "baselines")),
            (
                "masked in --modes, for a task with questions",
                questions and "masked" in self.modes,
                ("masks",),
            ),
            (
                "monte_carlo in --modes, for a task with questions",
                questions and "monte_carlo" in self.modes,
                ("samples",),
            ),
            ("a mode with masks in --modes", self.fills_in(), ("infill_words",)),
        ):
            for option in options:
                value, default = getattr(self, option), getattr(EvalSpec, option)
                if not is_used and value and value != default:  # 0 skips a measurement
                    text = value if isinstance(value, str | int) else ",".join(map(str, value))
                    raise UserError(f"--{option}={text} has no effect; it needs {needed}, or leave it out")

    def question_tasks(self) -> list[str]:
        """Returns the tasks that consist of questions."""
        return [task for task in self.tasks if task != HELD_OUT]

    def objectives(self) -> list[str]:
        """Returns the objectives that score held-out text in these modes, without duplicates."""
        return list(dict.fromkeys(OBJECTIVES[mode] for mode in self.modes))

    def fills_in(self) -> bool:
        """Returns True if one of the modes predicts masked tokens."""
        return "masked_diffusion" in self.objectives()

    def is_complete(self, results: Mapping) -> bool:
        """Returns True if `results` contains every task in every mode with the same limit."""
        tasks, held_out = results.get("tasks", {}), results.get("held_out", {})
        if HELD_OUT in self.tasks and not all(name in held_out for name in self.objectives()):
            return False
        return all(
            tasks.get(task, {}).get(mode, {}).get("limit") == self.limit
            for task in self.question_tasks()
            for mode in self.modes
        )
