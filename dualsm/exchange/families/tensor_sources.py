"""The tensors of a model folder: sources of each parameter, and names for export."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dualsm.exchange.families.family import LAYERS, OUTER_NAMES, Family
from dualsm.exchange.parameter_sources import Source
from dualsm.exchange.tensor_info import TensorInfo
from dualsm.process.errors import UserError

OUTPUT = OUTER_NAMES["head/output/kernel"]
_ROPE = "self_attn.rotary_emb.inv_freq"  # a buffer that early versions of transformers stored


def tensor_sources(
    family: Family, settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, Source | list[Source]], list[str]]:
    """Finds the tensors of each parameter.

    Args:
      family: the model's family.
      settings: values of `config.model`, see `Family.settings`.
      tensors: tensors of the weights by name.

    Returns:
      sources: see `dualsm.exchange.parameter_sources`.
      dropped: names of tensors that are not needed, with `*` for the number of a layer.

    Raises:
      UserError: if tensors are missing or unknown, or `settings` has another number of layers.
    """
    num_layers, tied = settings["num_layers"], settings["tie_word_embeddings"]
    layers = {int(m[1]) for name in tensors if (m := re.match(rf"{re.escape(LAYERS)}\.(\d+)\.", name))}
    if layers and len(layers) != num_layers:  # a damaged file may say a huge number
        raise UserError(
            f"config.json: num_hidden_layers={num_layers} but the weights have {len(layers)} layers; pass "
            "the config.json that belongs to the weights"
        )
    outer = {path: name for path, name in OUTER_NAMES.items() if not (tied and name == OUTPUT)}
    numbers = range(num_layers if layers else 1)
    expected = {*outer.values()}
    expected |= {f"{LAYERS}.{i}.{name}" for i in numbers for name in family.block_names.values()}
    unused = {name for name in tensors if name.endswith(_ROPE) or (tied and name == OUTPUT)}
    for problem, names in (
        ("no tensor", expected - tensors.keys()),
        ("the unknown tensor", tensors.keys() - expected - unused),
    ):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"--weights: {problem} {min(names)}{others}, unlike {family.architecture}; pass the folder "
                "of such a model"
            )
    sources: dict[str, Source | list[Source]] = {path: Source(name) for path, name in outer.items()}
    for path, name in family.block_names.items():
        sources[f"blocks/{path}"] = [Source(f"{LAYERS}.{i}.{name}") for i in numbers]
    return sources, sorted(unused)
