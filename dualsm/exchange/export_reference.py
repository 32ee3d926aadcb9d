"""Exports a run in the format of the paper's released models."""

from __future__ import annotations

import jax
from etils import epath

from dualsm.exchange import reference_format, token_ids
from dualsm.exchange.shifted_masks import USE_DUALSM, check_shifted
from dualsm.exchange.tokenizer_export import exported_tokenizer, has_standard_file, tokenizer_json
from dualsm.exchange.weight_files import write_safetensors
from dualsm.process.errors import UserError
from dualsm.process.output import new_folder
from dualsm.rundir.trained_run import TrainedRun


def export(run: TrainedRun, output: epath.Path) -> str:
    """Writes the weights, with the model's shape as metadata, and the tokenizer.

    A standard `tokenizer.json` that has all tokens is copied.

    Returns:
      A message for the user.

    Raises:
      UserError: if the run has the plain head or unshifted masked diffusion, which the format does not
        support, or `output` is in use.
    """
    model = run.config.model
    if model.head != "projected":
        raise UserError("the reference format does not support the plain head; use --format=huggingface")
    reference_format.check_switches(model, "use --format=huggingface")
    check_shifted(run, USE_DUALSM)
    tokenizer = exported_tokenizer(run)
    params = token_ids.to_external(jax.device_get(run.params), tokenizer.external_ids_V)
    metadata = {names[0]: str(model[key]) for key, names in reference_format.SETTINGS.items()}
    metadata["vocab_size"] = str(len(params["embedding"]["embedding"]))
    text = tokenizer.model.decode("utf-8") if has_standard_file(tokenizer) else tokenizer_json(tokenizer)
    with new_folder(output, "--output", last="model.safetensors") as folder:
        write_safetensors(folder / "model.safetensors", reference_format.from_params(params), metadata)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return f"weights in the reference format in {output}"
