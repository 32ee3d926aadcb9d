"""Rematerialization policies: which activations are saved for the backward pass."""

import jax

# Checkpoint name of the outputs of attention, and of the inputs of plain attention.
ATTENTION = "attention"

POLICIES = {
    "none": None,  # saves all
    "full": jax.checkpoint_policies.nothing_saveable,
    "matmuls": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION),
    ),
}
