"""A trained run: config, tokenizer and parameters, for evaluation, sampling and export."""

from __future__ import annotations

import dataclasses

import jax
from etils import epath
from ml_collections import ConfigDict

from dualsm import config as configs
from dualsm.data.corpus import TOKENIZER
from dualsm.data.tokenizer import Tokenizer
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.devices import sharding
from dualsm.model.transformer import Transformer, bind, init_params
from dualsm.process.errors import UserError
from dualsm.process.paths import user_path
from dualsm.rundir.checkpoint import abstract
from dualsm.rundir.checkpoint_reader import restore_parts
from dualsm.rundir.workdir import read_config


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run directory that has been opened.

    Attributes:
      workdir: the run directory.
      config: the run's config, with `model.attention` reset to "auto".
      tokenizer: the run's tokenizer.
      step: step of the checkpoint.
      params: parameters, sharded over `mesh`.
      mesh: data-parallel mesh of all devices.
      parameters: "last" for the weights, "ema" for their moving average.
    """

    workdir: epath.Path
    config: ConfigDict
    tokenizer: Tokenizer
    step: int
    params: dict
    mesh: jax.sharding.Mesh
    parameters: str = "last"

    def model(self, params: dict | None = None) -> Transformer:
        """Returns the model with the run's parameters, or with `params` (tracers in a jitted function)."""
        return bind(self.config.model, self.params if params is None else params)


PARAMETERS = {"last": "params", "ema": "ema"}  # --parameters -> field of the train state


def open_run(workdir: epath.PathLike, step: int | None = None, parameters: str = "last") -> TrainedRun:
    """Opens a run directory.

    Args:
      workdir: run directory, written by `python -m dualsm.train`.
      step: step of the checkpoint; None: the newest.
      parameters: "last" for the weights, "ema" for their moving average.

    Raises:
      UserError: if the run or the checkpoint does not exist or is damaged, has no moving average, or has a
        tokenizer of another size.
    """
    workdir = user_path(workdir)
    config = read_config(workdir)
    config.model.attention = "auto"  # this machine may lack the kernels of the training machine
    mesh_config = configs.default_config().mesh
    mesh = sharding.make_mesh(mesh_config, jax.devices())
    shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    layout = sharding.tree_shardings(mesh, shapes)
    field = PARAMETERS[parameters]
    step, parts = restore_parts(workdir, {field: abstract(shapes, layout)}, step)
    if field not in parts:
        raise UserError(
            f"parameters={parameters}: step {step} of {workdir} has no moving average of the weights "
            "(config.ema); use parameters=last"
        )
    path = workdir / TOKENIZER
    tokenizer = load_tokenizer(str(path))
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"tokenizer {path} has {tokenizer.vocab_size} ids but the model of the run has "
            f"{config.model.vocab_size}; restore the tokenizer file of the run"
        )
    return TrainedRun(workdir, config, tokenizer, step, parts[field], mesh, parameters)
