"""Imported weights as an ordinary run directory at step 0: it evaluates, samples and trains on."""

from __future__ import annotations

import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from dualsm import config as configs
from dualsm.data.corpus import TOKENIZER, Corpus
from dualsm.data.tokenizer import Tokenizer
from dualsm.devices import sharding
from dualsm.process.errors import UserError
from dualsm.process.output import new_folder
from dualsm.rundir.checkpoint import Checkpoints
from dualsm.rundir.workdir import CONFIG
from dualsm.training.loop import complete
from dualsm.training.program import compile_train_step

SOURCE = "source.json"  # where the weights came from


def fit_config(config: ConfigDict | None, settings: dict, tokenizer: Tokenizer) -> ConfigDict:
    """The config of the run that the weights become.

    Args:
      config: a recipe the run shall follow when it is trained on, or None: the defaults, in the weights'
        shape.
      settings: values of `config.model` that follow from the weights.
      tokenizer: the weights' own.

    Raises:
      UserError: when the recipe is for another model, or its corpus was made with another tokenizer.
    """
    recipe = config is not None
    config = config.copy_and_resolve_references() if recipe else configs.default_config()
    if not recipe and "num_heads" not in settings:
        raise UserError(
            "neither the weights file nor a config.json beside it says num_attention_heads; "
            "give a recipe, as in --config=dualsm:dual_470m"
        )
    for key, value in (settings | {"vocab_size": tokenizer.vocab_size}).items():
        if recipe and config.model[key] != value and (key, config.model[key]) != ("vocab_size", 0):
            raise UserError(f"config.model.{key}={config.model[key]} but the weights have {value}")
        config.model[key] = value
    configs.check_config(config)
    if config.data.path:
        corpus = Corpus(config.data.path)
        if corpus.manifest["tokenizer_sha256"] != tokenizer.sha256():
            raise UserError(
                f"the corpus {config.data.path} was made with another tokenizer than the weights; prepare it "
                "with --tokenizer set to theirs"
            )
        config = complete(config, corpus)
    return config


def write_run(config: ConfigDict, params: dict, tokenizer: Tokenizer, workdir: Path, source: dict) -> None:
    """Writes a run directory whose checkpoint of step 0 has the given parameters.

    Args:
      config: from `fit_config`.
      params: in our numbering, see dualsm/exchange/vocabulary.py.
      tokenizer: of the run.
      workdir: to make; it must not exist, or be empty.
      source: where the weights came from; kept beside them.

    Raises:
      UserError: when the folder is in use.
    """
    mesh = sharding.make_mesh(configs.default_config().mesh, jax.devices())
    program = compile_train_step(config, tokenizer.special, mesh)
    state = program.init()
    layout = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
    state = state._replace(params=jax.device_put(params, layout))
    with new_folder(workdir, "--workdir") as folder:
        (folder / TOKENIZER).write_bytes(tokenizer.model)
        (folder / CONFIG).write_text(configs.save_config(config))
        (folder / SOURCE).write_text(json.dumps(source, indent=1) + "\n")
        checkpoints = Checkpoints(folder, config.checkpoint)
        checkpoints.save(0, state)
        checkpoints.close()
