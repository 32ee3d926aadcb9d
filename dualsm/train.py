"""Trains a model, or resumes the run in a folder.

python -m dualsm.train --config=configs/tiny.py --workdir=runs/tiny
python -m dualsm.train --config=configs/tiny.py --workdir=runs/other --config.mixture.causal=0.75 ...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import jax
from absl import flags, logging
from ml_collections import config_flags

from dualsm import cli
from dualsm.training.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, see configs/")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; one that holds this run is resumed")
flags.mark_flags_as_required(["config", "workdir"])


def main(_: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax and Grain tell their life stories at INFO
    _use_compilation_cache()
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _stop(number, signals))
    if train(cli.config(_CONFIG), _WORKDIR.value, stop=lambda: bool(signals)):
        print(f"finished: {_WORKDIR.value}")
    else:
        print(f"stopped by {signals[0]}; run the same command to resume:\n  {_command()}")


def _stop(number: int, signals: list[str]) -> None:
    """Asks the run to save and stop; a second signal ends it at once."""
    if signals:
        os._exit(128 + number)
    signals.append(signal.Signals(number).name)
    print(f"\n{signals[0]}: finishing the step and saving (again: quit at once)", file=sys.stderr, flush=True)


def _command() -> str:
    return " ".join(["python -m dualsm.train", *sys.argv[1:]])


def _use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX was told where by its own variable."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "dualsm", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    cli.run(main)
