"""What the forward pass keeps for the backward pass, which computes the rest again."""

import jax

ATTENDED = "attended"  # what attention came to, under this name (`jax.ad_checkpoint.checkpoint_name`)

POLICIES = {
    "none": None,  # keeps all
    "full": jax.checkpoint_policies.nothing_saveable,
    "matmuls": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED),
    ),
}
