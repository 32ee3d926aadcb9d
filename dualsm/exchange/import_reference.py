"""Imports weights in the format of the paper's released models as a run directory."""

from __future__ import annotations

from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.exchange import imported_run, reference_format, token_ids
from dualsm.exchange.parameter_sources import load_params, num_ids
from dualsm.exchange.weight_files import open_weights, read_settings


def load(path: Path, tokenizer: str, recipe: ConfigDict | None, workdir: epath.Path) -> str:
    """Creates a run directory from weights.

    Args:
      path: weights, see `open_weights`.
      tokenizer: tokenizer file; empty: `tokenizer.json` in the folder of the weights.
      recipe: config for further training, see `imported_run.fit_config`.
      workdir: run directory to create.

    Returns:
      A message for the user.

    Raises:
      UserError: if a file is damaged, weights, tokenizer and recipe do not match, or `workdir` is in use.
    """
    imported_run.check_workdir(workdir)
    weights = open_weights(path)
    sources, dropped = reference_format.parameter_sources(weights.tensors)
    declared = read_settings(weights)
    settings = reference_format.model_settings(sources, weights.tensors, declared)
    known = load_tokenizer(tokenizer or str(weights.path.with_name("tokenizer.json")))
    settings["never_predicted"] = token_ids.never_predicted(known, num_ids(weights, sources))
    config = imported_run.fit_config(recipe, settings, known, reference_format.sequence_length(declared))
    reference_format.check_switches(config.model, "remove it from --config")
    params = load_params(weights, sources, imported_run.abstract_params(config), known.external_ids_V)
    source = {"format": "reference", "weights": weights.path.name, "sha256": weights.sha256()}
    imported_run.write_run(config, params, known, workdir, source)
    unused = [*dropped, *weights.ignored]
    return imported_run.message("a model with the paper's head", config, workdir, unused)
