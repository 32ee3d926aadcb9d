"""Job lists that run the cells of a sweep on a cluster."""

from __future__ import annotations

import re
import shlex

from dualsm.objectives.sources import trained_sources
from dualsm.process.cli import configs_folder
from dualsm.process.errors import UserError
from dualsm.process.paths import is_remote
from dualsm.sweeps.sweep_folder import Sweep


def job_list(sweep: Sweep, launcher: str, jobs: int | None = None) -> str:
    """Returns a script that submits the cells of a sweep to a cluster, one job per cell.

    Args:
      sweep: sweep with the cells to run.
      launcher: "slurm" (a batch script around `launch/slurm.sbatch`) or "tpu" (calls of `launch/tpu_vm.sh`).
      jobs: maximum number of cells that SLURM runs at the same time; None: no limit.

    Raises:
      UserError: if a TPU slice cannot read the corpora of the cells.
    """
    return _tpu_jobs(sweep) if launcher == "tpu" else _slurm_array(sweep, jobs)


def _slurm_array(sweep: Sweep, jobs: int | None) -> str:
    cases = []
    for number, cell in enumerate(sweep.cells):
        steps = [
            f"MODULE={module} bash launch/slurm.sbatch {shlex.join(arguments)}"
            for _, module, *arguments in sweep.commands(cell)
        ]
        cases.append(f"  {number}) " + " &&\n    ".join(steps) + " ;;")
    array = f"0-{len(cases) - 1}" + (f"%{jobs}" if jobs else "")
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"#SBATCH --job-name=dualsm-sweep --array={array} --nodes=1 --ntasks=1",
            "#SBATCH --signal=TERM@120 --requeue --open-mode=append",
            "# Submit from the checkout. A preempted cell is requeued automatically.",
            *(f"export {name}={shlex.quote(value)}" for name, value in sweep.environment().items()),
            "trap : TERM  # so that this shell outlives launch/slurm.sbatch",
            "case $SLURM_ARRAY_TASK_ID in",
            *cases,
            "esac",
        ]
    )


def _tpu_jobs(sweep: Sweep) -> str:
    """Returns commands that train each cell on a separate TPU slice and store the run in the bucket."""
    starts, fetches = [], []
    own = re.escape(f"{configs_folder()}/")  # an absolute path, which slices do not have
    for number, cell in enumerate(sweep.cells):
        name = f"{sweep.folder.name}-{number}"
        train = [flag for flag in sweep.commands(cell)[0][2:] if not flag.startswith("--workdir=")]
        train = [re.sub(rf"^--config={own}(\w+)\.py", r"--config=dualsm:\1", flag) for flag in train]
        starts.append(f"NAME={shlex.quote(name)} launch/tpu_vm.sh train {shlex.join(train)}")
        target = shlex.quote(str(sweep.path(cell)))
        fetches.append(f'#   gcloud storage cp -r "gs://$BUCKET/runs/{name}" {target}')
    return "\n".join(
        ["#!/usr/bin/env bash", "set -eu", *_tpu_variables(sweep), *starts]
        + ["# When all runs have ended, fetch them; then repeat the sweep command without --launch:"]
        + fetches
    )


def _tpu_variables(sweep: Sweep) -> list[str]:
    """Returns the lines that set the variables of `launch/tpu_vm.sh` that all cells share.

    Raises:
      UserError: if the cells read several corpora that are not in a bucket; the script copies only one.
    """
    configs = [sweep.configs[cell.name] for cell in sweep.cells]
    corpora = sorted({source.corpus for config in configs for source in trained_sources(config)})
    local = [path for path in corpora if not is_remote(path)]
    first = "# First export PROJECT, ZONE, BUCKET, TYPE and RUNTIME (see launch/tpu_vm.sh --help)"
    if not local:
        return [f"{first}.", "export CORPUS=  # each slice reads its corpora from the bucket"]
    if len(corpora) > 1 or any(config.sources for config in configs):
        raise UserError(
            f"--launch=tpu: a slice cannot read the corpus {local[0]!r}; with sources or several corpora, "
            "use gs:// paths"
        )
    message = "export the path of the corpus in the bucket, such as corpora/hplt"
    return [
        f"{first}, and CORPUS, the path of the corpus in the bucket.",
        f"export CORPUS=${{CORPUS?{message}}}",
    ]
