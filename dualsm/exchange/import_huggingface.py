"""Imports a model folder of transformers as a run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dualsm.exchange import imported_run, token_ids
from dualsm.exchange.families.family_table import family_of_config
from dualsm.exchange.families.tensor_sources import OUTPUT, tensor_sources
from dualsm.exchange.parameter_sources import Source, load_params, num_ids
from dualsm.exchange.special_tokens import adapt_tokenizer
from dualsm.exchange.weight_files import Weights, open_weights, read_json_object
from dualsm.process.errors import UserError
from dualsm.process.paths import user_path

MAX_SEQ_LEN = 2048  # of a run that is imported without a config; models may allow far longer sequences


def load(
    folder: Path, tokenizer: str, recipe: ConfigDict | None, workdir: epath.Path, mask_token: str = ""
) -> str:
    """Creates a run directory from a model folder.

    Args:
      folder: folder as `save_pretrained` writes it.
      tokenizer: tokenizer file; empty: `tokenizer.json` in the folder.
      recipe: config for further training, see `imported_run.fit_config`.
      workdir: run directory to create.
      mask_token: existing token to use as the mask, see `adapt_tokenizer`.

    Returns:
      A message for the user.

    Raises:
      UserError: if a file is missing or damaged, the model is not supported, weights, tokenizer and recipe do
        not match, or `workdir` is in use.
    """
    imported_run.check_workdir(workdir)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--weights={folder} has no config.json; pass a folder written by save_pretrained of transformers"
        )
    content = read_json_object(folder / "config.json")
    family = family_of_config(content)
    settings = family.settings(content)
    weights = open_weights(folder)
    sources, dropped = tensor_sources(family, settings, weights.tensors)
    size = num_ids(weights, sources)
    if content.get("vocab_size") != size:
        raise UserError(
            f"config.json: vocab_size={content.get('vocab_size')} but the embedding has {size} rows; pass "
            "the config.json of the weights"
        )
    _check_copy_of_embedding(weights, sources)
    path = user_path(tokenizer) if tokenizer else folder / "tokenizer.json"
    known, notes = adapt_tokenizer(folder, path, size, mask_token)
    settings["never_predicted"] = token_ids.never_predicted(known, size)
    longest = _max_position_embeddings(content)
    config = imported_run.fit_config(recipe, settings, known, min(longest, MAX_SEQ_LEN), adapted=bool(notes))
    params = load_params(weights, sources, imported_run.abstract_params(config), known.external_ids_V)
    source = {
        "format": "huggingface",
        "weights": weights.path.name,
        "sha256": weights.sha256(),
        "model_type": family.model_type,
        "max_position_embeddings": longest,
    }
    imported_run.write_run(config, params, known, workdir, source)
    unused = [*dropped, *weights.ignored]
    return "\n".join([imported_run.message(family.architecture, config, workdir, unused), *notes])


def _max_position_embeddings(content: Mapping[str, Any]) -> int:
    longest = content.get("max_position_embeddings")
    if type(longest) is not int or longest < 1:
        raise UserError(
            f"config.json: max_position_embeddings={longest!r} must be a positive integer; fix it"
        )
    return longest


def _check_copy_of_embedding(weights: Weights, sources: Mapping[str, Source | list[Source]]) -> None:
    """Raises `UserError` if the weights of a model with tied embeddings have another output matrix."""
    if "head/output/kernel" in sources or OUTPUT not in weights.tensors:
        return
    if not np.array_equal(weights.read(OUTPUT), weights.read(sources["embedding/embedding"].name)):
        raise UserError(
            f"config.json: tie_word_embeddings=true but {OUTPUT} differs from the embedding; fix the file"
        )
