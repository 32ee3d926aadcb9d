"""Metadata of a checkpoint: checksums of its arrays by path, which also list the arrays."""

from __future__ import annotations

import orbax.checkpoint as ocp

from dualsm.process.errors import UserError
from dualsm.rundir import checksums

CHECKSUMS = "checksums"  # key in the custom metadata of a checkpoint
WEIGHTS_ONLY = {"step", "params"}  # fields of the train state in a checkpoint of weights only


def verify(manager: ocp.CheckpointManager, step: int, restored) -> None:
    """Raises `UserError` unless restored arrays have the checksums in the metadata."""
    expected = _read(manager, step)
    if expected is None:
        raise UserError("its checksums are missing")
    wrong = checksums.changed(restored, expected)
    if wrong:
        raise UserError(f"{len(wrong)} of its arrays have wrong checksums ({wrong[0]}, ...)")


def saved_part(manager: ocp.CheckpointManager, step: int, state):
    """Returns the fields of a train state that a checkpoint contains.

    Args:
      manager: manager of the checkpoint.
      step: step of the checkpoint.
      state: train state, or a dict of its fields.

    Returns:
      `state` itself, or for a checkpoint without optimizer state a dict of the fields that it contains. For a
      dict, the fields that the checkpoint contains.
    """
    fields = {path.partition("/")[0] for path in _read(manager, step) or ()}
    if not fields or (fields != WEIGHTS_ONLY and not isinstance(state, dict)):
        return state
    values = state if isinstance(state, dict) else state._asdict()
    return {name: value for name, value in values.items() if name in fields}


def fill_missing_fields(state, restored):
    """Returns `restored` with the structure of `state`; fields that it lacks are None."""
    if isinstance(restored, dict) and hasattr(state, "_fields"):
        return type(state)(**dict.fromkeys(state._fields) | restored)
    return restored


def _read(manager: ocp.CheckpointManager, step: int) -> dict[str, int] | None:
    found = (manager.metadata(step).custom_metadata or {}).get(CHECKSUMS)
    return found if isinstance(found, dict) else None
