"""The paper's released models as files: taken in as a run directory, and written."""

from __future__ import annotations

from pathlib import Path

import jax
from ml_collections import ConfigDict

from dualsm.data.corpus import sha256
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.data.tokenizer_json import JsonTokenizer
from dualsm.exchange import reference, run_folder, vocabulary
from dualsm.exchange.huggingface import tokenizer_file
from dualsm.exchange.weights import read_settings, read_weights, write_safetensors
from dualsm.process.errors import UserError
from dualsm.process.output import new_folder
from dualsm.rundir.trained_run import TrainedRun


def load(weights: Path, tokenizer: str, recipe: ConfigDict | None, workdir: Path) -> str:
    """Makes a run directory of released weights; returns what it is, for people.

    Args:
      weights: safetensors, or what torch saved.
      tokenizer: file; empty: `tokenizer.json` beside the weights.
      recipe: to train on with, see `run_folder.fit_config`.
      workdir: to make.

    Raises:
      UserError: for files that are damaged or do not belong together, and as `new_folder` does.
    """
    tensors, metadata = read_weights(weights)
    params = reference.to_params(tensors)
    settings = reference.model_settings(params, read_settings(weights, metadata))
    known = load_tokenizer(tokenizer or str(weights.with_name("tokenizer.json")))
    config = run_folder.fit_config(recipe, settings, known)
    source = {"format": "reference", "weights": weights.name, "sha256": sha256(weights)}
    run_folder.write_run(config, vocabulary.to_ours(params, known.external_ids_V), known, workdir, source)
    model = config.model
    hint = "" if config.data.path else "; to train it on, import it with --config and --config.data.path"
    return f"{model.num_layers} layers of width {model.d_model}, at step 0, in {workdir}{hint}"


def export(run: TrainedRun, output: Path) -> str:
    """Writes weights, with the model's shape as metadata, and tokenizer; returns what it is, for people.

    Raises:
      UserError: for a run with the plain head, which that format cannot hold, and as `new_folder` does.
    """
    model = run.config.model
    if model.get("head", "projected") != "projected":
        raise UserError("the reference format has no plain head; use --format=huggingface")
    params = vocabulary.to_own(jax.device_get(run.params), run.tokenizer.external_ids_V)
    metadata = {name: str(model[key]) for key, name in reference.SETTINGS.items()}
    metadata["vocab_size"] = str(len(params["embedding"]["embedding"]))
    own = run.tokenizer
    text = own.model.decode("utf-8") if isinstance(own, JsonTokenizer) else tokenizer_file(own)
    with new_folder(output, "--output") as folder:
        write_safetensors(folder / "model.safetensors", reference.from_params(params), metadata)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return f"weights in the reference format in {output}"
