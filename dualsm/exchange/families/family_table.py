"""The table of families, and the choice of a family for import and export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dualsm.exchange.families.family import Family
from dualsm.exchange.families.llama import LLAMA, MISTRAL
from dualsm.exchange.families.olmo2 import OLMO2
from dualsm.exchange.families.qwen import QWEN2, QWEN3
from dualsm.exchange.families.smollm3 import SMOLLM3
from dualsm.exchange.switches import switched_on
from dualsm.process.errors import UserError

# By model_type. The first one that can express a run is used for runs that were not imported.
FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, SMOLLM3)}


def family_of_config(content: Mapping[str, Any]) -> Family:
    """Returns the family of a `config.json`. Raises `UserError` if it is not known."""
    name = content.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"config.json: model_type={name!r} is not supported; choose a model of the types "
            f"{', '.join(FAMILIES)}"
        )
    family, classes = FAMILIES[name], content.get("architectures")
    if classes not in (None, [family.architecture]):
        raise UserError(
            f"config.json: architectures={classes!r} is not supported; choose a {family.architecture}"
        )
    return family


def family_of_run(model: ConfigDict, imported_from: str | None = None) -> Family:
    """Returns a family that can express a run with the plain head.

    Args:
      model: `config.model`.
      imported_from: model_type of the weights that the run was imported from, which is preferred.

    Raises:
      UserError: if no family can express the run.
    """
    names = sorted(FAMILIES, key=lambda name: name != imported_from)
    for name in names:
        if not _obstacles(FAMILIES[name], model):
            return FAMILIES[name]
    nearest = min(FAMILIES.values(), key=lambda family: len(_obstacles(family, model)))
    settings = ", ".join(f"config.model.{key}" for key in _obstacles(nearest, model))
    raise UserError(
        f"no family of transformers has this architecture; the nearest, {nearest.model_type}, does not allow "
        f"the run's {settings}"
    )


def _obstacles(family: Family, model: ConfigDict) -> list[str]:
    """Returns the keys of `config.model` that keep a family from expressing a run."""
    missing = [key for key, value in family.fixed.items() if model[key] != value]
    return missing + [
        key for key in switched_on(model) if key not in family.switches and key not in family.fixed
    ]
