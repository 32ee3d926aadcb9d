"""Job lists that run the cells of a sweep on a cluster."""

from __future__ import annotations

import shlex

from dualsm.sweeps.sweep_folder import Sweep


def job_list(sweep: Sweep, launcher: str, jobs: int | None = None) -> str:
    """Returns a script that submits the cells of a sweep to a cluster, one job per cell.

    Args:
      sweep: sweep with the cells to run.
      launcher: "slurm" (a batch script around `launch/slurm.sbatch`) or "tpu" (calls of `launch/tpu_vm.sh`).
      jobs: maximum number of cells that SLURM runs at the same time; None: no limit.
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
    for number, cell in enumerate(sweep.cells):
        name = f"{sweep.folder.name}-{number}"
        train = [flag for flag in sweep.commands(cell)[0][2:] if not flag.startswith("--workdir=")]
        starts.append(f"NAME={shlex.quote(name)} launch/tpu_vm.sh train {shlex.join(train)}")
        target = shlex.quote(str(sweep.path(cell)))
        fetches.append(f'#   gcloud storage cp -r "gs://$BUCKET/runs/{name}" {target}')
    return "\n".join(
        ["#!/usr/bin/env bash", "set -eu", *starts]
        + ["# When all runs have ended, fetch them; then repeat the sweep command without --launch:"]
        + fetches
    )
