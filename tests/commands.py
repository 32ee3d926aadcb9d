"""Commands in this process, which saves the seconds that a new process takes to import JAX."""

import importlib.util
import sys
from unittest import mock

from absl import flags

from dualsm.process import cli


def call_command(name: str, *arguments: str) -> None:
    """Runs `python -m dualsm.NAME ...` without its set-up of JAX; raises its `UserError`s."""
    before = set(flags.FLAGS)  # commands have flags of the same names
    spec = importlib.util.find_spec(f"dualsm.{name}")
    module = importlib.util.module_from_spec(spec)
    argv = [name, *arguments]
    try:
        # ml_collections reads overrides from `sys.argv`.
        with mock.patch.object(cli, "set_up_jax"), mock.patch.object(sys, "argv", argv):
            spec.loader.exec_module(module)
            module.main(cli._parse_flags(argv))
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
        flags.FLAGS.unparse_flags()
