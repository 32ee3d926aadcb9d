"""Imports weights in the format of the paper's released models as a run directory."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from dualsm.data.corpus import sha256
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.exchange import imported_run, reference_format, token_ids
from dualsm.exchange.weight_files import read_settings, read_weights


def load(weights: Path, tokenizer: str, recipe: ConfigDict | None, workdir: Path) -> str:
    """Creates a run directory from weights.

    Args:
      weights: safetensors file, or a state dict that torch saved.
      tokenizer: tokenizer file; empty: `tokenizer.json` in the folder of the weights.
      recipe: config for further training, see `imported_run.fit_config`.
      workdir: run directory to create.

    Returns:
      A message for the user.

    Raises:
      UserError: if a file is damaged, weights, tokenizer and recipe do not match, or `workdir` is in use.
    """
    tensors, metadata = read_weights(weights)
    params = reference_format.to_params(tensors)
    settings = reference_format.model_settings(params, read_settings(weights, metadata))
    known = load_tokenizer(tokenizer or str(weights.with_name("tokenizer.json")))
    config = imported_run.fit_config(recipe, settings, known)
    source = {"format": "reference", "weights": weights.name, "sha256": sha256(weights)}
    params = token_ids.to_internal(params, known.external_ids_V)
    imported_run.write_run(config, params, known, workdir, source)
    model = config.model
    hint = "" if config.data.path else "; to train it further, import it with --config and --config.data.path"
    return f"{model.num_layers} layers with d_model={model.d_model}, at step 0, in {workdir}{hint}"
