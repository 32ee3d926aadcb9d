"""A run directory, opened for use: its config, tokenizer and newest parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from ml_collections import ConfigDict

from dualsm import config as configs
from dualsm.data.corpus import TOKENIZER
from dualsm.data.tokenizer import Tokenizer
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.devices import sharding
from dualsm.model.transformer import Transformer, bind, init_params
from dualsm.rundir.checkpoint import abstract, restore_params
from dualsm.rundir.workdir import read_config


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """What a trained run consists of.

    Attributes:
      workdir: its folder.
      config: its config; how attention is computed is left to the device it is used on.
      tokenizer: its tokenizer.
      step: the checkpoint's.
      params: laid out on `mesh`.
      mesh: over all devices.
    """

    workdir: Path
    config: ConfigDict
    tokenizer: Tokenizer
    step: int
    params: dict
    mesh: jax.sharding.Mesh

    def model(self, params: dict | None = None) -> Transformer:
        """The model with the run's parameters, or with `params` (tracers inside a jitted function)."""
        return bind(self.config.model, self.params if params is None else params)


def open_run(workdir: str | Path, step: int | None = None) -> TrainedRun:
    """Opens a run directory.

    Args:
      workdir: made by `python -m dualsm.train`.
      step: of the checkpoint; None takes the newest.

    Raises:
      UserError: when there is no such run or checkpoint.
    """
    workdir = Path(workdir).expanduser()
    config = read_config(workdir)
    config.model.attention = "auto"  # kernels of the machine it was trained on bind nobody here
    mesh_config = configs.default_config().mesh  # use is data-parallel, however the run was trained
    mesh = sharding.make_mesh(mesh_config, jax.devices())
    shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    layout = sharding.tree_shardings(mesh, shapes)
    step, params = restore_params(workdir, abstract(shapes, layout), step)
    return TrainedRun(workdir, config, load_tokenizer(str(workdir / TOKENIZER)), step, params, mesh)
