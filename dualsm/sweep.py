"""Runs a grid of configs, one run directory per cell, and writes a report.

    python -m dualsm.sweep --config=configs/tiny.py --workdir=runs/sweep \\
        --grid=repetitions=1,4,16,64 --grid=alpha=0,1/64,1/8,1/2,1 \\
        --rule='repetitions=64: optimizer.learning_rate=0.005'
    python -m dualsm.sweep ... --launch=slurm > sweep.sbatch

The same command again runs the remaining cells. Failed and diverged cells are recorded; the command fails
only if all cells that ran have failed.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dualsm.analysis.sweep_report import report, report_text
from dualsm.evaluation.spec import EvalSpec
from dualsm.process import cli
from dualsm.process.paths import user_path
from dualsm.process.progress import say
from dualsm.sweeps.cluster import job_list
from dualsm.sweeps.grid import make_cells, parse_axes, parse_cell, parse_rule
from dualsm.sweeps.jobs import check_outcomes, run_missing
from dualsm.sweeps.sweep_folder import Sweep

GRID = ("repetitions=1,4,16,64", "alpha=0,1/8,1/2,7/8,1")

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file of all cells, see configs/")
_WORKDIR = cli.DEFINE_path("workdir", None, "folder of the sweep")
_GRID = flags.DEFINE_multi_string(
    "grid", list(GRID), "KEY=VALUE,VALUE,...; repeat for each axis; alpha is the share of causal rows"
)
_CELL = flags.DEFINE_multi_string("cell", [], "KEY=VALUE,...: an additional cell; repeat for each cell")
_RULE = flags.DEFINE_multi_string(
    "rule",
    [],
    "KEY=VALUE,...: KEY=VALUE,...: values for the cells that have one of the first values",
)
_JOBS = flags.DEFINE_integer(
    "jobs",
    None,
    "maximum number of concurrent cells; default: 1 on this machine (cores are divided), no limit on SLURM",
    lower_bound=1,
)
_LAUNCH = flags.DEFINE_enum("launch", "here", ("here", "slurm", "tpu"), "run here, or print a job list")
_TASKS = flags.DEFINE_list("tasks", [], "tasks to evaluate each cell on; see dualsm.evaluate")
_TASK_DATA = cli.DEFINE_path("task_data", "", "folder of the task files")
_MODES = flags.DEFINE_list("modes", ["causal", "prefix", "masked"], "evaluation modes")
_LIMIT = flags.DEFINE_integer("limit", 0, "number of examples per task; 0 for all", lower_bound=0)
flags.mark_flags_as_required(["config", "workdir"])


def main(_: Sequence[str]) -> None:
    if not _TASKS.value:
        cli.check_flags({"--tasks=NAME,...": (_TASK_DATA, _MODES, _LIMIT)}, "--tasks=")
    cli.check_flags({"--launch=here": (_JOBS,), "--launch=slurm": (_JOBS,)}, f"--launch={_LAUNCH.value}")
    axes = parse_axes(_GRID.value)
    cells = make_cells(axes, [parse_rule(t) for t in _RULE.value], [parse_cell(t) for t in _CELL.value])
    config = cli.config(_CONFIG)
    flag = flags.FLAGS["config"]
    recipe, overrides = config_flags.get_config_filename(flag), config_flags.get_override_values(flag)
    eval_spec = None
    if _TASKS.value:
        eval_spec = EvalSpec(_TASKS.value, _MODES.value, _TASK_DATA.value, _LIMIT.value)
        eval_spec.check()
    sweep = Sweep(user_path(_WORKDIR.value), recipe, overrides, config, cells, eval_spec)
    if _LAUNCH.value != "here":
        print(job_list(sweep, _LAUNCH.value, _JOBS.value))
        return
    sweep.check()
    sweep.folder.mkdir(parents=True, exist_ok=True)
    sweep.write_plan(axes)
    outcomes = run_missing(sweep, _JOBS.value or 1)
    for path in report(sweep.folder):
        say(f"wrote {path}")
    say(report_text(sweep.folder))
    check_outcomes(sweep, outcomes)


if __name__ == "__main__":
    cli.run(main)
