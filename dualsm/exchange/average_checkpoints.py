"""The mean of several checkpoints of a run, as a run directory at step 0."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from dualsm.exchange.imported_run import check_workdir, write_run
from dualsm.exchange.weights_source import read_source
from dualsm.process.errors import UserError
from dualsm.process.progress import say
from dualsm.rundir.checkpoint_reader import checkpoint_steps
from dualsm.rundir.trained_run import open_run
from dualsm.rundir.workdir import read_config


def write(workdir: epath.Path, steps: Sequence[int], last: int, output: epath.Path) -> str:
    """Writes a run directory whose parameters are the mean of checkpoints.

    The mean is computed in float64 and rounded to float32 once, so that it does not depend on the order.

    Args:
      workdir: the run.
      steps: steps of the checkpoints; empty: the `last` newest ones.
      last: number of checkpoints, if `steps` is empty.
      output: run directory to create.

    Returns:
      A message for the user.

    Raises:
      UserError: if a checkpoint does not exist or `output` is in use.
    """
    check_workdir(output, "--output")
    found = checkpoint_steps(workdir)
    if len(found) < last:
        raise UserError(
            f"--last={last}: {workdir} has only {len(found)} checkpoints ({_listed(found)}); keep more with "
            "config.checkpoint.max_to_keep or config.checkpoint.keep_period"
        )
    steps = sorted(set(steps)) if steps else found[-last:]
    if missing := set(steps) - set(found):
        raise UserError(f"--checkpoints: {workdir} has no checkpoint of step {_listed(sorted(missing))}")
    total = None
    for step in steps:
        say(f"reading the checkpoint of step {step}")
        run = open_run(workdir, step)
        params = jax.tree.map(lambda p: np.asarray(p, np.float64), jax.device_get(run.params))
        total = params if total is None else jax.tree.map(np.add, total, params)
    mean = jax.tree.map(lambda sums: (sums / len(steps)).astype(np.float32), total)
    origin = read_source(run)
    source = {
        "format": f"mean of checkpoints {_listed(steps)}",
        "weights": workdir.name,
        "steps": list(steps),
    }
    source |= {key: origin[key] for key in ("model_type", "max_position_embeddings") if key in origin}
    config = read_config(workdir)
    config.ema.decay, config.valid.parameters = 0.0, "last"  # there is no moving average of this mean
    write_run(config, mean, run.tokenizer, output, source, "--output")
    return f"mean of the checkpoints of steps {_listed(steps)}, at step 0, in {output}"


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))
