"""Choosing a token from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dualsm.data.tokenizer import RESERVED_IDS, SpecialIds
from dualsm.process.errors import UserError

GREEDY_BELOW = 1e-5  # temperature; float32 cannot hold logits over less, and vLLM has the same limit


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; below `GREEDY_BELOW`, the likeliest token is taken.
      top_k: draw among this many likeliest tokens; 0: among all.
      top_p: draw among the fewest likeliest tokens that together have this probability, after temperature
        and `top_k`; 1: among all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature <= float(np.finfo(np.float32).max):  # NaN fails every comparison
            raise UserError(f"temperature={self.temperature}: must be finite and at least 0")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: must be at least 0; 0 draws among all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must lie in (0, 1]; 1 draws among all tokens")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW


def allowed_logits(logits_V: jax.Array, special: SpecialIds, may_stop: bool) -> jax.Array:
    """Logits with the reserved ids, which are no text, at minus infinity; `</s>` is left if `may_stop`."""
    ids_V = jnp.arange(logits_V.shape[-1])
    allowed_V = ids_V >= RESERVED_IDS
    if may_stop:
        allowed_V |= ids_V == special.eos
    return jnp.where(allowed_V, logits_V, -jnp.inf)


def pick(logits_V: jax.Array, key: jax.Array, sampling: SamplingParams) -> jax.Array:
    """One token from the logits at one position, int32 []."""
    if sampling.greedy:
        return jnp.argmax(logits_V, axis=-1).astype(jnp.int32)
    logits_V = logits_V / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        sorted_V = jnp.sort(logits_V, descending=True)
        least = sorted_V[-1]
        if sampling.top_k:
            least = sorted_V[min(sampling.top_k, sorted_V.shape[0]) - 1]
            sorted_V = jnp.where(sorted_V >= least, sorted_V, -jnp.inf)
        if sampling.top_p < 1:
            # A token stays if those likelier than it have together less than top_p.
            probability_V = jax.nn.softmax(sorted_V)
            before_V = jnp.cumsum(probability_V) - probability_V
            least = jnp.maximum(least, jnp.min(jnp.where(before_V < sampling.top_p, sorted_V, sorted_V[0])))
        logits_V = jnp.where(logits_V >= least, logits_V, -jnp.inf)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)
