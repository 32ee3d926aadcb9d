"""Reads a `config.json` key by key, so that unknown keys are rejected by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dualsm.process.errors import UserError

# Keys that do not change the logits, beside all that begin with "_". Token ids are read separately.
_WITHOUT_EFFECT = {
    "architectures", "attn_implementation", "bos_token_id", "dtype", "eos_token_id", "finetuning_task",
    "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "is_llama_config",
    "keys_to_ignore_at_inference", "label2id", "license", "max_position_embeddings", "max_window_layers",
    "model_type", "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "task_specific_params", "tokenizer_class",
    "torch_dtype", "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_cache", "vocab_size",
}  # fmt: skip
_NO_DEFAULT = object()


class HubConfig:
    """A `config.json` whose keys are read one by one; a key with the value null counts as absent."""

    def __init__(self, content: Mapping[str, Any]):
        self._left = {key: value for key, value in content.items() if value is not None}

    def take(self, key: str, kind: type, default: Any = _NO_DEFAULT) -> Any:
        """Returns the value of a key and counts the key as understood.

        Args:
          key: the key.
          kind: type of the value; a float may be written as an integer.
          default: value if the key is absent; if not given, the key is required.

        Raises:
          UserError: if the key is absent and required, or its value has another type or is not finite.
        """
        if key not in self._left:
            if default is _NO_DEFAULT:
                raise UserError(f"config.json has no {key}; add the value that the model was trained with")
            return default
        value = self._left.pop(key)
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds or (kind is float and not math.isfinite(value)):
            raise UserError(f"config.json: {key}={value!r} must be of type {kind.__name__}; fix the file")
        return float(value) if kind is float else value

    def positive(self, key: str, kind: type = int, default: Any = _NO_DEFAULT) -> Any:
        """Returns the value of a key that must be a number above 0; see `take`."""
        value = self.take(key, kind, default)
        if value is not default and value <= 0:
            raise UserError(f"config.json: {key}={value} must be positive; fix the file")
        return value

    def allow(self, key: str, *allowed: Any) -> None:
        """Counts a key as understood. Raises `UserError` if it is present with a value not in `allowed`."""
        value = self._left.pop(key, None)
        if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
            only = f"only {' or '.join(map(repr, allowed))}" if allowed else "no value of this key"
            raise UserError(f"config.json: {key}={value!r} is not supported, {only}; choose another model")

    def finish(self) -> None:
        """Raises `UserError` if a key is left that was not understood."""
        for key in sorted(key for key in self._left if key not in _WITHOUT_EFFECT and key[:1] != "_"):
            raise UserError(
                f"config.json: {key}={self._left[key]!r} is not understood; remove the key if it does not "
                "change the model's logits"
            )
