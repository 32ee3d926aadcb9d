"""Origin of imported weights, as recorded in `source.json`."""

from __future__ import annotations

from dualsm.exchange.weight_files import read_json_object
from dualsm.process.paths import user_path
from dualsm.rundir.trained_run import TrainedRun
from dualsm.rundir.workdir import SOURCE, read_config

_MAX_FORKS = 100  # stops at a run that is forked from itself


def read_source(run: TrainedRun) -> dict:
    """Returns the origin of a run's weights, or of those of the run that it was forked from.

    Returns:
      The content of `source.json`; empty if the run started from random weights, or if the directory of the
      run that it was forked from does not exist.
    """
    workdir, config = run.workdir, run.config
    for _ in range(_MAX_FORKS):
        path = workdir / SOURCE
        if path.exists():
            return read_json_object(path)
        if not config.start.run or not user_path(config.start.run).is_dir():
            break
        workdir = user_path(config.start.run)
        config = read_config(workdir)
    return {}
