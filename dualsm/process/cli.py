"""The edge between a command line and the code: flags in, one-line errors out.

Every command is `python -m dualsm.NAME`, an absl program whose `main` is handed to `run`.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

from dualsm.process.errors import UNREAD, UserError, explained, unread
from dualsm.process.memory import keep_freed_memory, may_use_accelerator
from dualsm.process.progress import escape_unprintable

flags.disclaim_key_flags()  # those of `DEFINE_path` belong to the command that calls it


class _PathParser(flags.ArgumentParser):
    """Expands `~`, which shells leave alone in `--flag=~/folder`."""

    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)

    def flag_type(self) -> str:
        return "path"


def DEFINE_path(name: str, default: str | None, help: str) -> flags.FlagHolder[str]:
    """Defines a flag for the path of a file or folder; `~` is expanded in its value."""
    return flags.DEFINE(_PathParser(), name, default, help)


def fail(message: str) -> None:
    """Prints one line to stderr and exits with status 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's flag parser, with every failure (config files included) told in one line."""
    flags.FLAGS.set_gnu_getopt(True)  # flags may come after a verb, as in `convert import --weights=...`
    try:
        return flags.FLAGS(find_configs(argv))
    except SystemExit as end:  # absl's --help counts as a failure
        sys.exit(end.code if _raised_by_config(end) else 0)
    except (flags.Error, UserError) as error:
        text, _, trace = str(error).partition("\n\nTraceback")
        return fail(" ".join([text, *trace.splitlines()[-1:]]))
    except BrokenPipeError:  # of --help, which is printed here
        raise
    except Exception as error:  # anything a config file, which is code, may raise
        if where := _raised_by_config(error):
            return fail(f"{type(error).__name__}: {_text(error)} ({where})")
        if isinstance(error, (AttributeError, LookupError)):  # ml_collections' answers to an unknown key
            known = "see dualsm/config.py for all keys"
            return fail(f"unknown config key on the command line: {_text(error)} ({known})")
        return fail(f"{type(error).__name__} on the command line: {_text(error)}")


def _raised_by_config(error: BaseException) -> str | None:
    """File and line at which a config file, or what it called, raised an error that came out of the parser of
    flags; None if the parser itself did."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and module.partition(".")[0] not in ("absl", "ml_collections"):
            return f"{frame.f_code.co_filename}, line {line}"
    return None


def _text(error: BaseException) -> str:
    """What an error says, without the quotes that a `KeyError` puts around it."""
    while len(error.args) == 1 and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def find_configs(argv: Sequence[str]) -> list[str]:
    """Arguments with the paths of their configs: `~` expanded, and `--config=dualsm:NAME` turned into a path.

    NAME is one of dualsm's own configs, in the installed package or beside it in a checkout.

    Raises:
      UserError: when there is no such config.
    """
    package = Path(__file__).parents[1]
    folder = package / "configs"
    if not folder.is_dir():
        folder = package.parent / "configs"
    found = []
    for before, argument in itertools.pairwise(["", *argv]):
        flag = next((start for start in ("--config=", "-config=") if argument.startswith(start)), "")
        if flag or before in ("--config", "-config"):
            path = os.path.expanduser(argument.removeprefix(flag))
            is_own, (name, colon, rest) = path.startswith("dualsm:"), path[7:].partition(":")
            if is_own and not (name.isidentifier() and (folder / f"{name}.py").exists()):
                names = ", ".join(sorted(path.stem for path in folder.glob("[a-z]*.py")))
                raise UserError(f"--config=dualsm:{name}: there is no such config; there are {names}")
            argument = f"{flag}{folder / name}.py{colon}{rest}" if is_own else flag + path
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
    """Keeps compiled programs between runs (where JAX was told to, if it was), and on CPU freed memory.

    Args:
      cpu_devices: that JAX is to make of a CPU, which it can until its first use; 0: as it was told.
    """
    import jax

    if cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    # On accelerator hosts threads would wait for the one arena. JAX cannot be asked for its platform: that
    # starts its threads, and these keep the arenas that they start with.
    if not may_use_accelerator(jax.config.jax_platforms):
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
    """Runs `main(argv)` as an absl program; what the user can mend ends in one line and exit status 2.

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
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if text := explained(error):
                fail(text)
            raise

    sys.unraisablehook = _ignore_leftovers(sys.unraisablehook)
    escape_unprintable()
    try:
        try:
            app.run(guarded, flags_parser=_parse_flags)
        except SystemExit:
            sys.stdout.flush()  # at the interpreter's end nobody could catch its failure
            raise
    except BrokenPipeError as error:
        if not unread(error):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # it takes what is still to be printed
        sys.exit(UNREAD)
