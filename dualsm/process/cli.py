"""Command lines: flags, config files and one-line errors.

Every command is an absl program, `python -m dualsm.NAME`, that passes its `main` to `run`.
"""

from __future__ import annotations

import itertools
import logging as std_logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import app, flags, logging

from dualsm.process.errors import (
    BROKEN_PIPE,
    WHERE_KEYS_ARE_LISTED,
    UserError,
    exit_status,
    is_broken_stdout,
    user_message,
)
from dualsm.process.memory import keep_freed_memory, may_use_accelerator
from dualsm.process.progress import escape_unprintable, warn

flags.disclaim_key_flags()  # flags of `DEFINE_path` belong to the calling command


class _PathParser(flags.ArgumentParser):
    """Parses a path and expands `~`, which shells do not expand in `--flag=~/folder`."""

    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)

    def flag_type(self) -> str:
        return "path"


def DEFINE_path(name: str, default: str | None, help: str) -> flags.FlagHolder[str]:
    """Defines a flag for the path of a file or folder; expands `~` in its value."""
    return flags.DEFINE(_PathParser(), name, default, help, serializer=flags.ArgumentSerializer())


def fail(message: str, status: int = 2) -> None:
    """Prints one line to stderr and exits."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags with absl; reports every error, also in config files, in one line."""
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow a verb, as in `convert import --weights=...`
    try:
        return flags.FLAGS(find_configs(argv))
    except SystemExit as end:  # absl exits with status 1 after --help
        sys.exit(end.code if _raised_by_config(end) else 0)
    except (flags.Error, UserError) as error:
        text, _, trace = str(error).partition("\n\nTraceback")
        return fail(" ".join([text, *trace.splitlines()[-1:]]))
    except BrokenPipeError:  # absl prints the output of --help here
        raise
    except Exception as error:  # config files are code and can raise anything
        if where := _raised_by_config(error):
            return fail(f"{type(error).__name__}: {_text(error)} ({where})")
        if isinstance(error, (AttributeError, LookupError)):  # raised by ml_collections for an unknown key
            return fail(f"unknown config key on the command line: {_text(error)} ({WHERE_KEYS_ARE_LISTED})")
        return fail(f"{type(error).__name__} on the command line: {_text(error)}")


def _raised_by_config(error: BaseException) -> str | None:
    """Returns file and line if a config file or its callee raised the error, None if the flag parser did."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and module.partition(".")[0] not in ("absl", "ml_collections"):
            return f"{frame.f_code.co_filename}, line {line}"
    return None


def _text(error: BaseException) -> str:
    """Returns the message of an error, without the quotes that `KeyError` adds."""
    while len(error.args) == 1 and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def configs_folder() -> Path:
    """Returns the folder of dualsm's own configs, in the installed package or in the checkout."""
    package = Path(__file__).parents[1]
    folder = package / "configs"
    return folder if folder.is_dir() else package.parent / "configs"


def find_configs(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with `~` and `--config=dualsm:NAME` replaced by paths.

    NAME is a config in `configs_folder()`.

    Raises:
      UserError: if the config does not exist.
    """
    folder, found = configs_folder(), []
    for before, argument in itertools.pairwise(["", *argv]):
        flag = next((start for start in ("--config=", "-config=") if argument.startswith(start)), "")
        if flag or before in ("--config", "-config"):
            path = os.path.expanduser(argument.removeprefix(flag))
            is_own, (name, colon, rest) = path.startswith("dualsm:"), path[7:].partition(":")
            if is_own and not (name.isidentifier() and (folder / f"{name}.py").exists()):
                names = ", ".join(sorted(path.stem for path in folder.glob("[a-z]*.py")))
                raise UserError(f"--config=dualsm:{name}: no such config; choose one of: {names}")
            argument = f"{flag}{folder / name}.py{colon}{rest}" if is_own else flag + path
        found.append(argument)
    return found


def config(flag: flags.FlagHolder):
    """Returns the value of a config flag. Raises `UserError` if its file cannot be read."""
    value = flag.value
    try:
        value.items  # noqa: B018 (ml_collections reports a missing file at the first access)
    except OSError as error:
        raise UserError(f"--{flag.name}: {error.__cause__ or error}") from error
    return value


def check_flags(flags_of: Mapping[str, Sequence[flags.FlagHolder]], chosen: str) -> None:
    """Checks that no flag is set that has no effect with the chosen mode, verb or format.

    Args:
      flags_of: flags that have an effect only with some choices, by choice, as on the command line, such as
        "--mode=diffusion". A flag may be in several entries.
      chosen: the choice.

    Raises:
      UserError: if a flag is set that has no effect.
    """
    used = {flag.name for flag in flags_of.get(chosen, ())}
    for flag in itertools.chain.from_iterable(flags_of.values()):
        if flag.name not in used and flag.value != flag.default:
            choices = [choice for choice, own in flags_of.items() if flag.name in {f.name for f in own}]
            raise UserError(
                f"{flags.FLAGS[flag.name].serialize()} has no effect with {chosen}; use "
                f"{' or '.join(choices)}, or leave the flag out"
            )


def set_up_jax(cpu_devices: int = 0, keep_memory: bool = True) -> None:
    """Enables JAX's compilation cache and, on CPU, keeps freed memory. Call it before the first use of JAX.

    Args:
      cpu_devices: number of CPU devices; 0 does not change JAX's setting.
      keep_memory: False returns freed memory to the operating system.
    """
    import jax

    _show_warnings_about_backends()
    if cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    # On accelerator hosts threads would wait for the shared arena. Asking JAX for its platform starts its
    # threads, which keep the arenas that they start with.
    if keep_memory and not may_use_accelerator(jax.config.jax_platforms):
        # With several devices there are many threads, which allocate small blocks.
        keep_freed_memory(one_arena=jax.config.jax_num_cpu_devices <= 1)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "dualsm", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class _BackendWarnings(std_logging.Handler):
    """Prints JAX's warnings about accelerators that it does not use, which `run` would otherwise hide."""

    def emit(self, record: std_logging.LogRecord) -> None:
        text = record.getMessage()
        if "CUDA-enabled jaxlib is not installed" in text:
            text += " To use the GPU: pip install 'dualsm[cuda]' (dualsm[cuda12] for drivers before 580)"
        warn(text)


def _show_warnings_about_backends() -> None:
    logger = std_logging.getLogger("jax._src.xla_bridge")
    if not any(isinstance(handler, _BackendWarnings) for handler in logger.handlers):
        logger.addHandler(_BackendWarnings(std_logging.WARNING))
        logger.setLevel(std_logging.WARNING)
        logger.propagate = False


def _ignore_leftovers(hook: Callable) -> Callable:
    """Wraps `sys.unraisablehook` to ignore errors that Orbax leaves behind after a failed read or write.

    After a failure, Orbax's writers use a closed event loop, and its readers of other parts of a damaged
    checkpoint fail too. The failure itself is reported separately.
    """

    def ignore(unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # set if the object is a coroutine
        orbax = code is not None and "orbax" in code.co_filename
        if not orbax and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return ignore


def run(main: Callable[[Sequence[str]], None], verbs: Sequence[str] = ()) -> None:
    """Runs `main(argv)` as an absl program; reports an error that a user can fix in one line.

    The exit status is then that of `exit_status`.

    Args:
      main: receives the program's name and, if there are verbs, the chosen verb.
      verbs: allowed values of the first argument; empty if there are no positional arguments.
    """

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.FATAL)  # Orbax also raises the errors that it logs
        try:
            if verbs and argv[1:2] not in [[verb] for verb in verbs]:
                raise UserError(f"the first argument must be one of: {', '.join(verbs)}")
            if len(argv) > 1 + bool(verbs):
                raise UserError(f"unexpected argument {argv[-1]!r}; flags look like --name=value")
            main(argv)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if text := user_message(error):
                fail(text, exit_status(error))
            raise

    sys.unraisablehook = _ignore_leftovers(sys.unraisablehook)
    escape_unprintable()
    try:
        try:
            app.run(guarded, flags_parser=_parse_flags)
        except SystemExit:
            sys.stdout.flush()  # a failure to flush at interpreter exit cannot be caught
            raise
    except BrokenPipeError as error:
        if not is_broken_stdout(error):
            raise
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())  # discards further output
        sys.exit(BROKEN_PIPE)
