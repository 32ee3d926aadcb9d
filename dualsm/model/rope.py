"""Rotary position embedding (RoFormer, arXiv 2104.09864), optionally with scaled frequencies."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_collections

from dualsm.process.errors import UserError

SCALINGS = ("none", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a model.

    Attributes:
      head_dim: K, size of a head.
      theta: base of the frequencies.
      name: scaling of the frequencies, one of `SCALINGS`. The other attributes belong to "llama3".
      factor: divides the frequencies of wavelengths above `original_max_position_embeddings` /
        `low_freq_factor` positions.
      low_freq_factor: see `factor`.
      high_freq_factor: frequencies of wavelengths below `original_max_position_embeddings` /
        `high_freq_factor` positions are unchanged; those between the two bounds are interpolated.
      original_max_position_embeddings: sequence length before the context was extended.
    """

    head_dim: int
    theta: float
    name: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def angles(self, positions_L: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns cosines and sines of the rotary embedding, each float32 [..., L, 1, K/2]."""
        angles = positions_L.astype(jnp.float32)[..., None, None] * self.frequencies()
        return jnp.cos(angles), jnp.sin(angles)

    def frequencies(self) -> jax.Array:
        """Returns radians per position, float32 [K/2]; scaled as in Llama 3.1 if `name` is "llama3"."""
        frequencies = self.theta ** (-jnp.arange(0, self.head_dim, 2, dtype=jnp.float32) / self.head_dim)
        if self.name == "none":
            return frequencies
        cycles = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (cycles - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = jnp.clip(kept, 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotate(x_BxLxHxK: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies the rotary embedding in rotate-half form."""
    cos, sin = (a.astype(x_BxLxHxK.dtype) for a in angles)
    first, second = jnp.split(x_BxLxHxK, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotated_layers(num_layers: int, interval: int) -> jax.Array | None:
    """Returns True for each layer with a rotary embedding, bool [N]; None if all layers have it.

    Args:
      num_layers: N.
      interval: every `interval`-th layer has no rotary embedding; 0: all layers have it.
    """
    return (jnp.arange(num_layers) + 1) % interval != 0 if interval else None


def layer_angles(
    angles: tuple[jax.Array, jax.Array], is_rotated: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns `angles`, or those of no rotation if `is_rotated` is False."""
    if is_rotated is None:
        return angles
    cos, sin = angles
    return jnp.where(is_rotated, cos, 1), jnp.where(is_rotated, sin, 0)


def check_rope_scaling(scaling: ml_collections.ConfigDict) -> None:
    """Raises `UserError` if the bounds of `config.model.rope_scaling` are in the wrong order."""
    if scaling.name != "none" and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(
            f"config.model.rope_scaling.low_freq_factor={scaling.low_freq_factor} must be less than "
            f"high_freq_factor={scaling.high_freq_factor}; change one of them"
        )
