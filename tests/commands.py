"""Commands in this process, which saves the seconds that a new process takes to import JAX."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from unittest import mock

from absl import flags

from dualsm.process import cli


def call_command(name: str, *arguments: str) -> None:
    """Runs `python -m dualsm.NAME ...` without its set-up of JAX; raises its `UserError`s."""
    spec = importlib.util.find_spec(f"dualsm.{name}")
    module = importlib.util.module_from_spec(spec)
    argv = [name, *arguments]
    # ml_collections reads overrides from `sys.argv`.
    with scope_of_flags(), mock.patch.object(cli, "set_up_jax"), mock.patch.object(sys, "argv", argv):
        spec.loader.exec_module(module)
        module.main(cli._parse_flags(argv))


@contextlib.contextmanager
def scope_of_flags() -> Iterator[None]:
    """Removes the absl flags that are defined inside: commands share names, and some flags are required."""
    before = set(flags.FLAGS)
    try:
        yield
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
        flags.FLAGS.unparse_flags()
