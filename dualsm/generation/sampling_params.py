"""Sampling parameters, and sampling tokens from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dualsm.data.tokenizer import RESERVED_IDS, SpecialIds
from dualsm.process.errors import UserError

GREEDY_BELOW = 1e-5  # temperature; logits divided by less overflow float32 (vLLM uses the same limit)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters.

    Attributes:
      temperature: divides the logits; below `GREEDY_BELOW` decoding is greedy.
      top_k: number of most likely tokens to sample from; 0: all.
      top_p: minimum total probability of the most likely tokens to sample from, after
        `temperature` and `top_k`; 1: all tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature <= float(np.finfo(np.float32).max):  # False for NaN
            raise UserError(f"temperature={self.temperature} must be finite and at least 0")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must be at least 0; use 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be in (0, 1]; use 1 for all tokens")

    @property
    def greedy(self) -> bool:
        """True if the most likely token is always chosen."""
        return self.temperature < GREEDY_BELOW


def mask_reserved_ids(logits_V: jax.Array, special: SpecialIds, allow_eos: bool) -> jax.Array:
    """Sets the logits of reserved ids to -inf, except for `</s>` if `allow_eos`."""
    ids_V = jnp.arange(logits_V.shape[-1])
    allowed_V = ids_V >= RESERVED_IDS
    if allow_eos:
        allowed_V |= ids_V == special.eos
    return jnp.where(allowed_V, logits_V, -jnp.inf)


def filter_logits(logits_V: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Divides the logits at one position by the temperature, and sets those of excluded tokens to -inf.

    Sampling is from the softmax of the result. With greedy decoding only the most likely token remains.
    """
    if sampling.greedy:
        return jnp.where(jnp.arange(logits_V.shape[0]) == jnp.argmax(logits_V), 0.0, -jnp.inf)
    logits_V = logits_V / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        sorted_V = jnp.sort(logits_V, descending=True)
        smallest = sorted_V[-1]
        if sampling.top_k:
            smallest = sorted_V[min(sampling.top_k, sorted_V.shape[0]) - 1]
            sorted_V = jnp.where(sorted_V >= smallest, sorted_V, -jnp.inf)
        if sampling.top_p < 1:
            # Keeps a token if the tokens that are likelier have a total probability below top_p.
            probability_V = jax.nn.softmax(sorted_V)
            before_V = jnp.cumsum(probability_V) - probability_V
            kept_V = jnp.where(before_V < sampling.top_p, sorted_V, sorted_V[0])
            smallest = jnp.maximum(smallest, jnp.min(kept_V))
        logits_V = jnp.where(logits_V >= smallest, logits_V, -jnp.inf)
    return logits_V


def sample(logits_V: jax.Array, key: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Samples a token from the logits at one position, int32 []."""
    if sampling.greedy:
        return jnp.argmax(logits_V, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits_V, sampling)).astype(jnp.int32)
