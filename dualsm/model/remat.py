"""What the forward pass keeps for the backward pass, which computes the rest again."""

import jax

# What attention came to, and what plain attention works on; by `jax.ad_checkpoint.checkpoint_name`.
ATTENTION = "attention"

POLICIES = {
    "none": None,  # keeps all
    "full": jax.checkpoint_policies.nothing_saveable,
    "matmuls": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION),
    ),
}
