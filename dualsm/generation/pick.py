"""Choosing a token from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dualsm.data.tokenizer import RESERVED_IDS, SpecialIds
from dualsm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Picking:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw among this many likeliest tokens; 0: among all.
      top_p: draw among the fewest likeliest tokens that together have this probability; 1: among all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"temperature={self.temperature} and top_k={self.top_k} must not be negative, "
                f"top_p={self.top_p} must lie in (0, 1]"
            )


def allowed_logits(logits_V: jax.Array, special: SpecialIds, may_stop: bool) -> jax.Array:
    """Logits with the reserved ids, which are no text, at minus infinity; `</s>` is left if `may_stop`."""
    ids_V = jnp.arange(logits_V.shape[-1])
    allowed_V = ids_V >= RESERVED_IDS
    if may_stop:
        allowed_V |= ids_V == special.eos
    return jnp.where(allowed_V, logits_V, -jnp.inf)


def pick(logits_V: jax.Array, key: jax.Array, picking: Picking) -> jax.Array:
    """One token from the logits at one position, int32 []."""
    if picking.temperature == 0:
        return jnp.argmax(logits_V, axis=-1).astype(jnp.int32)
    logits_V = logits_V / picking.temperature
    if picking.top_k or picking.top_p < 1:
        sorted_V = jnp.sort(logits_V, descending=True)
        least = sorted_V[-1]
        if picking.top_k:
            least = jnp.maximum(least, sorted_V[min(picking.top_k, sorted_V.shape[0]) - 1])
        if picking.top_p < 1:
            # A token stays if those likelier than it have together less than top_p.
            before_V = jnp.cumsum(jax.nn.softmax(sorted_V)) - jax.nn.softmax(sorted_V)
            least = jnp.maximum(least, jnp.min(jnp.where(before_V < picking.top_p, sorted_V, jnp.inf)))
        logits_V = jnp.where(logits_V >= least, logits_V, -jnp.inf)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)
