"""Trains a model, or resumes the run in a folder.

python -m dualsm.train --config=configs/tiny.py --workdir=runs/tiny
python -m dualsm.train --config=configs/tiny.py --workdir=runs/other --config.mixture.causal=0.75 ...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dualsm import cli
from dualsm.training.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, see configs/")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; one that holds this run is resumed")
flags.mark_flags_as_required(["config", "workdir"])


def main(_: Sequence[str]) -> None:
    cli.use_compilation_cache()
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _stop(number, signals))
    if not train(cli.config(_CONFIG), _WORKDIR.value, stop=lambda: bool(signals)):
        print(f"stopped by {signals[0]}; run the same command to resume:\n  {_command()}")


def _stop(number: int, signals: list[str]) -> None:
    """Asks the run to save and stop; a second signal ends it at once."""
    if signals:
        os._exit(128 + number)
    signals.append(signal.Signals(number).name)
    print(f"\n{signals[0]}: finishing the step and saving (again: quit at once)", file=sys.stderr, flush=True)


def _command() -> str:
    return " ".join(["python -m dualsm.train", *sys.argv[1:]])


if __name__ == "__main__":
    cli.run(main)
