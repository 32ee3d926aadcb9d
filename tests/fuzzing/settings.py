"""Fuzzing targets: configs from the command line and from a run's `config.json`."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from absl import flags
from hypothesis import strategies as st
from ml_collections import config_flags

from dualsm import config as configs
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.rundir.workdir import read_config
from dualsm.training import loop
from tests.fuzzing.artifacts import Target
from tests.fuzzing.damage import ODD_VALUES
from tests.micro import micro_config

FLAGS = "flags.json"  # the command line, as a JSON list


class _Compiling(Exception):
    """Raised where training would compile."""


def targets(corpus: Path, scratch: Path) -> dict[str, Target]:
    """Returns targets that read a run's config and the flags of a command."""
    recipe = scratch / "recipe.py"
    recipe.write_text(
        "from tests.micro import micro_config\n\n\n"
        f"def get_config():\n    config = micro_config({str(corpus)!r})\n    config.mesh.data = -1\n"
        "    return config\n"
    )
    config = micro_config(corpus)
    config.mesh.data = -1
    saved = configs.save_config(config).encode()
    flags_of = {FLAGS: b"[]"}
    return {
        "config of a run": Target({"config.json": saved}, _load),
        "config on the command line": Target(flags_of, _parser(recipe), arguments()),
    }


def arguments() -> st.SearchStrategy[bytes]:
    """Returns a strategy for up to four overrides of config keys, with any values."""
    keys = sorted(_leaves(configs.default_config()))
    words = [
        "causal",
        "infinite",
        "cosine",
        "linear",
        "steps",
        "adamw",
        "plain",
        "bfloat16",
        "none",
        "bell",
        "RS",
    ]
    path = "0.5 causal=1; 1 masked_diffusion=1"
    numbers = ["1", "2", "4", "8", "16", "64", "0.25", "0.5", "0.75"] * 3
    values = st.sampled_from([*map(_plain, ODD_VALUES), *words, path, *numbers]) | st.text(max_size=8)
    override = st.builds("--config.{}={}".format, st.sampled_from([*keys, "model", "widht", ""]), values)
    return st.lists(override, min_size=1, max_size=4).map(lambda found: json.dumps(found).encode())


def _plain(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)[:300]


def _leaves(config, prefix: str = ""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _load(folder: Path) -> None:
    _begin(read_config(folder), folder / "run")


def _parser(recipe: Path) -> Callable[[Path], None]:
    def use(folder: Path) -> None:
        fresh, said = flags.FlagValues(), io.StringIO()
        flag = config_flags.DEFINE_config_file("config", None, "recipe", flag_values=fresh)
        given = ["train", f"--config={recipe}", *json.loads((folder / FLAGS).read_text())]
        with (
            mock.patch.object(flags, "FLAGS", fresh),
            mock.patch("sys.argv", given),  # ml_collections reads overrides from here
            contextlib.redirect_stderr(said),
        ):
            try:
                cli._parse_flags(given)
            except SystemExit as ended:
                assert ended.code == 2 and said.getvalue().count("\n") == 1, said.getvalue()
                raise UserError(said.getvalue()) from ended
        _begin(cli.config(flag), folder / "run")

    return use


def _begin(config, workdir: Path) -> None:
    """Trains until compilation, and checks that nothing was written before."""
    try:
        with mock.patch.object(loop, "compile_train_step", side_effect=_Compiling):
            loop.train(config, workdir)
    except _Compiling:
        pass
    finally:
        assert not workdir.exists()
