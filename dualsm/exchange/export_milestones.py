"""Exports the milestones of a run, one folder per checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from etils import epath

from dualsm.process.errors import UserError
from dualsm.process.output import new_folder
from dualsm.rundir.checkpoint_reader import checkpoint_steps
from dualsm.rundir.milestones import read_milestones
from dualsm.rundir.trained_run import TrainedRun, open_run

PREFIX = "chck_"  # names that the evaluation pipeline of the BabyLM challenge expects


def export(
    workdir: epath.Path,
    output: epath.Path,
    parameters: str,
    export_run: Callable[[TrainedRun, epath.Path], str],
) -> str:
    """Writes one model folder per milestone that the run has reached, such as `output/chck_1M`.

    Args:
      workdir: the run directory.
      output: folder to create, atomically.
      parameters: see `open_run`.
      export_run: writes the folder of one checkpoint and returns a message.

    Returns:
      A message for the user, which names the milestones without a checkpoint.

    Raises:
      UserError: if the run has no checkpoint of a milestone, or `output` is in use or cannot be written.
    """
    milestones, saved = read_milestones(workdir), set(checkpoint_steps(workdir))
    missing = [f"{name} (step {step})" for step, name in milestones.items() if step not in saved]
    if len(missing) == len(milestones):
        raise UserError(
            f"{workdir} has no checkpoint of a milestone; the first is {missing[0]}: continue the training"
        )
    name_of_step = {step: f"{PREFIX}{milestones[step]}" for step in sorted(saved.intersection(milestones))}
    last = f"{list(name_of_step.values())[-1]}/config.json"
    with new_folder(output, "--output", last) as folder:
        for step, name in name_of_step.items():
            export_run(open_run(workdir, step, parameters), epath.Path(folder) / name)
    names = ", ".join(name_of_step.values())
    absent = f"; no checkpoint of {', '.join(missing)}" if missing else ""
    return f"{workdir}: {names} for transformers in {output}{absent}"
