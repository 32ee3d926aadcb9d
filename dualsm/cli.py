"""The edge between a command line and the code: flags in, one-line errors out.

Every command is `python -m dualsm.NAME`, an absl program whose `main` is handed to `run`.
"""

from __future__ import annotations

import errno
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

from dualsm.errors import UserError
from dualsm.memory import keep_freed_memory

# What a disk does to any command: no rights, no room, no disk.
DISK_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE,
    errno.ENOTCONN, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
}  # fmt: skip


def fail(message: str) -> None:
    """Prints one line to stderr and exits with status 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's flag parser, with every failure (config files included) told in one line."""
    flags.FLAGS.set_gnu_getopt(True)  # flags may come after a verb, as in `convert import --weights=...`
    try:
        return flags.FLAGS(find_configs(argv))
    except (flags.Error, UserError) as error:
        return fail(str(error).split("\n\nTraceback")[0])
    except AttributeError as error:  # ml_collections' answer to an unknown config key
        return fail(f"unknown config key {error} on the command line; see dualsm/config.py for all keys")
    except Exception as error:  # anything a config file, which is code, may raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return fail(f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})")


def find_configs(argv: Sequence[str]) -> list[str]:
    """Arguments with `--config=dualsm:NAME` turned into the path of NAME, one of dualsm's own configs.

    They lie in the installed package, or beside it in a checkout.

    Raises:
      UserError: when there is no such config.
    """
    package = Path(__file__).parent
    folder = package / "configs"
    if not folder.is_dir():
        folder = package.parent / "configs"
    found = []
    for before, argument in itertools.pairwise(["", *argv]):
        flag, is_own, value = argument.partition("dualsm:")
        name, colon, rest = value.partition(":")
        if is_own and (flag in ("--config=", "-config=") or (not flag and before in ("--config", "-config"))):
            if not (name.isidentifier() and (folder / f"{name}.py").exists()):
                names = ", ".join(sorted(path.stem for path in folder.glob("[a-z]*.py")))
                raise UserError(f"--config=dualsm:{name}: there is no such config; there are {names}")
            argument = f"{flag}{folder / name}.py{colon}{rest}"
        found.append(argument)
    return found


def config(flag: flags.FlagHolder):
    """The value of a config flag. Raises `UserError` when its file could not be read."""
    value = flag.value
    try:
        value.items  # noqa: B018 (ml_collections reports a missing file at the first access)
    except OSError as error:
        raise UserError(f"--{flag.name}: {error.__cause__ or error}") from error
    return value


def set_up_jax(cpu_devices: int = 0) -> None:
    """Keeps freed memory, and compiled programs between runs (where JAX was told to, if it was).

    Args:
      cpu_devices: that JAX is to make of a CPU, which it can until its first use; 0: as it was told.
    """
    import jax

    if cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    # Many devices: many threads, with small blocks each.
    keep_freed_memory(one_arena=jax.config.jax_num_cpu_devices <= 1)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "dualsm", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _ignore_leftovers(hook: Callable) -> Callable:
    """A hook for errors that nobody can catch, without those that Orbax leaves after a failed read or write.

    Its writers report to an event loop that the failure has closed, and readers of other parts of a damaged
    checkpoint fail unheard; the failure itself is told in a line.
    """

    def ignore(unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        orbax = code is not None and "orbax" in code.co_filename
        if not orbax and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return ignore


def run(main: Callable[[Sequence[str]], None], verbs: Sequence[str] = ()) -> None:
    """Runs `main(argv)` as an absl program; a `UserError` ends in one line and exit status 2.

    Args:
      main: is given the program's name and, if there are verbs, the one that was chosen.
      verbs: of which the first argument must be one.
    """

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.FATAL)  # what Orbax logs below it is raised too, and told in a line
        try:
            if verbs and argv[1:2] not in [[verb] for verb in verbs]:
                raise UserError(f"say what to do, one of: {', '.join(verbs)}")
            if len(argv) > 1 + bool(verbs):
                raise UserError(f"unexpected argument {argv[-1]!r}; flags look like --name=value")
            main(argv)
        except UserError as error:
            fail(str(error))
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            fail(f"{error}; see to the room, the rights and the disk there, or choose another folder")
        except RuntimeError as error:
            if "Unable to initialize backend" not in str(error):
                raise
            fail(f"{error}; install the extra for it (cuda, tpu), or unset JAX_PLATFORMS")
        except KeyboardInterrupt:
            sys.exit(130)

    sys.unraisablehook = _ignore_leftovers(sys.unraisablehook)
    app.run(guarded, flags_parser=_parse_flags)
