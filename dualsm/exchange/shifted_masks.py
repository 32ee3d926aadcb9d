"""Check of the positions at which an export with masked modes predicts masked tokens."""

from __future__ import annotations

from dualsm.generation.generate import is_shifted
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun

USE_DUALSM = "use dualsm, in the modes causal and prefix"  # if no format supports the run


def check_shifted(run: TrainedRun, advice: str) -> None:
    """Checks that a run predicts a masked token at the position before it, as exported code assumes.

    Args:
      run: the run.
      advice: what to do instead, for the message.

    Raises:
      UserError: if the run was trained with unshifted masked diffusion.
    """
    if not is_shifted(run):
        raise UserError(
            f"{run.workdir} was trained with objectives.masked_diffusion.shifted=False, but the masked modes "
            f"of the export need a shifted model; {advice}"
        )
