"""Writes imported weights as a run directory at step 0, ready for evaluation and training."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable

import jax
from etils import epath
from ml_collections import ConfigDict

from dualsm import config as configs
from dualsm.data.corpus import TOKENIZER
from dualsm.data.tokenizer import Tokenizer
from dualsm.devices import sharding
from dualsm.model.transformer import init_params
from dualsm.process.errors import UserError
from dualsm.process.output import check_empty, new_folder, remove_interrupted_upload
from dualsm.rundir.checkpoint import abstract
from dualsm.rundir.weights_checkpoint import save_weights
from dualsm.rundir.workdir import CONFIG, SOURCE
from dualsm.training.run_corpora import open_corpora
from dualsm.training.start import complete


def check_workdir(workdir: epath.Path, flag: str = "--workdir") -> None:
    """Raises `UserError`, naming the flag, if `write_run` could not create the run directory."""
    remove_interrupted_upload(workdir, last=CONFIG)
    check_empty(workdir, flag)


def fit_config(
    config: ConfigDict | None,
    settings: dict,
    tokenizer: Tokenizer,
    seq_len: int | None = None,
    adapted: bool = False,
) -> ConfigDict:
    """Returns the config of a run with imported weights.

    Args:
      config: config for further training; None: the defaults, with the shape of the weights.
      settings: values of `config.model` that the weights determine, by flattened key.
      tokenizer: tokenizer of the weights.
      seq_len: sequence length of the weights, used if `config` is None.
      adapted: True if the tokenizer differs from its file, see `special_tokens.adapt_tokenizer`.

    Raises:
      UserError: if the config is for a different model, or its corpus has a different tokenizer.
    """
    recipe = config is not None
    config = config.copy_and_resolve_references() if recipe else configs.default_config()
    if not recipe and "num_heads" not in settings:
        raise UserError(
            "--weights: num_attention_heads is in neither the weights file nor a config.json in its folder; "
            "pass a config, for example --config=dualsm:dual_470m"
        )
    for key, value in (settings | {"vocab_size": tokenizer.vocab_size}).items():
        found = operator.attrgetter(key)(config.model)
        if recipe and found != value and (key, found) not in (("vocab_size", 0), ("never_predicted", "")):
            raise UserError(f"config.model.{key}={found} but the weights have {value}; change the config")
        config.model.update_from_flattened_dict({key: value})
    if not recipe and seq_len:
        config.seq_len = seq_len
    configs.check_config(config)
    if config.data.path or config.sources:
        corpora = open_corpora(config)
        if corpora[0].corpus.manifest["tokenizer_sha256"] != tokenizer.sha256():
            advice = "prepare it again with --tokenizer set to that file"
            if adapted:
                advice = (
                    "import without --config first, and prepare it again with "
                    f"--tokenizer=WORKDIR/{TOKENIZER} of that run"
                )
            raise UserError(
                f"the corpus {corpora[0].source.corpus} was not prepared with the tokenizer of the "
                f"{'imported run' if adapted else 'weights'}; {advice}"
            )
        config = complete(config, corpora)
    return config


def message(name: str, config: ConfigDict, workdir: epath.PathLike, unused: Iterable[str]) -> str:
    """Returns the message about an imported run.

    Args:
      name: name of the model's class.
      config: config of the run.
      workdir: the run directory.
      unused: tensors and entries of the weights that are not parameters.
    """
    text = (
        f"{name} with {config.model.num_layers} layers, d_model={config.model.d_model} and "
        f"seq_len={config.seq_len}, at step 0, in {workdir}"
    )
    if not (config.data.path or config.sources):
        text += "; to train it further, fork it with configs/adapt.py"
    patterns = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in unused})
    return f"{text}\nnot used: {', '.join(patterns)}" if patterns else text


def abstract_params(config: ConfigDict) -> dict:
    """Returns the shapes, dtypes and shardings of a run's parameters on this machine's devices."""
    mesh = sharding.make_mesh(configs.default_config().mesh, jax.devices())
    shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    return abstract(shapes, sharding.tree_shardings(mesh, shapes))


def write_run(
    config: ConfigDict,
    params: dict,
    tokenizer: Tokenizer,
    workdir: epath.Path,
    source: dict,
    flag: str = "--workdir",
) -> None:
    """Writes a run directory with the parameters as the checkpoint of step 0.

    Args:
      config: from `fit_config`.
      params: parameters with internal ids, see dualsm/exchange/token_ids.py.
      tokenizer: tokenizer of the run.
      workdir: run directory to create; must not exist or be empty.
      source: origin of the weights, written to source.json.
      flag: flag that sets `workdir`, for messages.

    Raises:
      UserError: if `workdir` is in use.
    """
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config))
    params = jax.device_put(params, layout)
    with new_folder(workdir, flag, last=CONFIG) as folder:
        (folder / TOKENIZER).write_bytes(tokenizer.model)
        (folder / CONFIG).write_text(configs.save_config(config))
        (folder / SOURCE).write_text(json.dumps(source, indent=1) + "\n")
        save_weights(folder, params)
