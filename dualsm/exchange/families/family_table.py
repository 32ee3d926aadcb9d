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


def family_of_run(model: ConfigDict, imported_from: str | None = None) -> Family | None:
    """Returns a family that has a run's architecture; None if there is none.

    Args:
      model: `config.model`.
      imported_from: model_type of the weights that the run was imported from, which is preferred.
    """
    names = sorted(FAMILIES, key=lambda name: name != imported_from)
    return next((FAMILIES[name] for name in names if _can_express(FAMILIES[name], model)), None)


def _can_express(family: Family, model: ConfigDict) -> bool:
    if model.head != "plain" or any(model[key] != value for key, value in family.fixed.items()):
        return False
    return all(key in family.switches or key in family.fixed for key in switched_on(model))
