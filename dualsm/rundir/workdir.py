"""The run directory: config, ownership and lock."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from etils import epath
from ml_collections import ConfigDict

from dualsm import config as configs
from dualsm.data.corpus import TOKENIZER, Corpus
from dualsm.process.errors import UserError
from dualsm.process.output import partial_path, try_lock, write_atomically
from dualsm.process.paths import is_remote, user_path
from dualsm.rundir.checkpoint_folder import is_trained

CONFIG = "config.json"
SOURCE = "source.json"  # origin of imported weights
LOCK = ".lock"

# Keys that may differ between the processes of a job, because they do not change the computation.
PROCESS_KEYS = (
    "data.prefetch_steps", "data.path", "data.num_threads", "data.verify", "sources.*.corpus",
)  # fmt: skip

_REQUIRED = {"steps", "model", "data", "mixture"}  # keys that all versions write
_DAMAGE = (ValueError, TypeError, AttributeError, KeyError, ArithmeticError, RecursionError, UserError)


def read_config(workdir: epath.PathLike) -> ConfigDict:
    """Reads the config of a run; keys that an older version did not write have their defaults.

    Raises:
      UserError: if the config is missing or damaged.
    """
    path = user_path(workdir) / CONFIG
    config = configs.default_config()
    try:
        saved = configs.load_config(path.read_text())
        if not _REQUIRED.issubset(saved):
            raise UserError("it is not the config of a run")
        config.update(saved)
        configs.check_config(config)
    except OSError as error:
        raise UserError(f"no run at {workdir}: {CONFIG} is missing; check the path") from error
    except configs.OldVersion as error:
        raise UserError(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return config


def _other_corpus(changes: list[str], config: ConfigDict) -> str:
    """Returns the path of a corpus whose identity is among the changes of a config, or ""."""
    changed = {change.partition(":")[0] for change in changes}
    paths = {"data.identity": config.data.path} | {
        f"sources.{name}.identity": source.corpus for name, source in config.sources.items()
    }
    return next((path for key, path in paths.items() if key in changed), "")


def _has_corpus(config: ConfigDict) -> bool:
    """Returns True if a config records its corpus; weights imported without a config have none."""
    sources = config.sources.values()
    return bool(config.data.identity) or any(source.get("identity") for source in sources)


def check_config_of_run(workdir: epath.Path, config: ConfigDict) -> None:
    """Raises `UserError` unless the directory is new or contains a run with the same config and corpus."""
    path = workdir / CONFIG
    if path.exists():
        saved = read_config(workdir)
        if not is_trained(workdir):  # imported weights, for example, have no order yet
            saved.data.order_version = config.data.order_version
        changes = configs.difference(saved, config)
        if any(change.startswith("data.order_version:") for change in changes):
            raise UserError(
                f"{workdir} was trained in version {saved.data.order_version} of the order of documents, and "
                f"this dualsm has version {config.data.order_version}; finish the run with the dualsm that "
                "started it, or choose another --workdir"
            )
        if changes and not _has_corpus(saved):
            raise UserError(
                f"{workdir} contains imported weights with another config ({'; '.join(changes)}); train a "
                f"fork of them: another --workdir with --config.start.run={workdir}"
            )
        if found := _other_corpus(changes, config):
            raise UserError(f"{workdir} was trained on another corpus than {found}; choose another --workdir")
        if changes:
            raise UserError(
                f"{workdir} contains a run with another config ({'; '.join(changes)}); choose another "
                "--workdir"
            )
        return
    harmless = (LOCK, partial_path(path).name)
    if workdir.exists() and any(entry.name not in harmless for entry in workdir.iterdir()):
        raise UserError(f"{workdir} is not empty but has no {CONFIG}; choose another --workdir")


def check_same(config: ConfigDict, main: str) -> None:
    """Compares the config and corpus of this process with those of the main process.

    Args:
      config: config of this process.
      main: config of the main process, as JSON text.

    Raises:
      UserError: if they differ in a key that is not in `PROCESS_KEYS`.
    """
    changes = configs.difference(configs.load_config(main), config, free=PROCESS_KEYS)
    if found := _other_corpus(changes, config):
        raise UserError(f"the corpus {found} differs from that of process 0; copy it to this host again")
    if changes:
        raise UserError(
            f"this process has another config than process 0 ({'; '.join(changes)}); start all processes of "
            "a job with the same command"
        )


def write_config(workdir: epath.Path, config: ConfigDict, corpus: Corpus) -> None:
    """Writes the config and the tokenizer into the run directory.

    The config is written first and atomically, so that `check_config_of_run` accepts the directory even if
    the process is killed in this function.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / CONFIG, configs.save_config(config))
    write_atomically(workdir / TOKENIZER, (corpus.folder / TOKENIZER).read_bytes())


@contextlib.contextmanager
def lock(workdir: epath.PathLike) -> Iterator[None]:
    """Locks a run directory inside the context; creates the directory if it does not exist.

    The lock is an operating system lock on an open file, which is released when the process ends. Object
    stores have no locks: directories there are not locked.

    Raises:
      UserError: if another process has locked the directory; the message names the process.
    """
    if is_remote(workdir):
        yield
        return
    workdir = user_path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / LOCK, "a+") as file:
        if try_lock(file) is False:
            file.seek(0)
            raise UserError(
                f"{workdir} is in use by {file.read().strip() or 'another run'}; wait for it, stop it, or "
                "choose another --workdir"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
