"""Log-likelihoods of targets, given the features that predict them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualsm.devices.sharding import batch_devices
from dualsm.model.transformer import Transformer

_LOGITS_CHUNK = 1024  # positions per device whose logits are in memory at the same time


def target_scores(
    model: Transformer, features_BxPxD: jax.Array, target_BxP: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns -log p(target) at each position, float32 [B, P], and True where the target is the argmax.

    Args:
      model: the model.
      features_BxPxD: features of P positions.
      target_BxP: token after each position.
    """
    kernel_DxV = model.head.output.kernel[...].astype(features_BxPxD.dtype)
    bias_V = model.output_bias().astype(jnp.float32)

    def score(features_BxD, target_B):
        logits_BxV = jnp.dot(features_BxD, kernel_DxV, preferred_element_type=jnp.float32) + bias_V
        nll_B = jax.nn.logsumexp(logits_BxV, -1) - jnp.take_along_axis(logits_BxV, target_B[:, None], 1)[:, 0]
        return nll_B, logits_BxV.argmax(-1) == target_B

    by_position = (features_BxPxD.swapaxes(0, 1), target_BxP.T)
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else batch_devices(mesh)
    chunk_size = max(1, _LOGITS_CHUNK * devices // len(target_BxP))
    nll_PxB, is_argmax_PxB = jax.lax.map(lambda part: score(*part), by_position, batch_size=chunk_size)
    return nll_PxB.T, is_argmax_PxB.T
