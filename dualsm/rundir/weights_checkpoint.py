"""Checkpoints of weights only, from which training starts with a new optimizer state."""

from __future__ import annotations

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dualsm.rundir import checksums
from dualsm.rundir.checkpoint_folder import CHECKPOINTS
from dualsm.rundir.checkpoint_metadata import CHECKSUMS


def save_weights(workdir: epath.PathLike, params: dict) -> None:
    """Writes parameters as the checkpoint of step 0, without copies of all of them in memory.

    Args:
      workdir: run directory.
      params: nested dict of arrays.
    """
    state = {"step": np.int32(0), "params": params}
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    # Compression would have copies of all arrays in memory, and hardly shrinks float weights.
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=(largest + 1024) / 1e9,  # must exceed every array
        use_compression=False,
    )
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    folder = epath.Path(workdir).absolute() / CHECKPOINTS
    with ocp.CheckpointManager(folder, options=options, item_handlers=handler) as manager:
        metadata = {CHECKSUMS: checksums.checksums_one_by_one(state)}
        manager.save(0, args=ocp.args.PyTreeSave(state), custom_metadata=metadata)
