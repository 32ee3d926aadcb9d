"""Masked diffusion, shifted (masked next-token prediction) or not; its loss is a bound on the likelihood.

Source: LLaDA (arXiv 2502.09992) for the bound with exact counts, arXiv 2512.14549 for the shift.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from dualsm.objectives.example import Example, Row, SpecialIds, document_spans, has_target, is_text
from dualsm.objectives.masking import choose, hide

TIMES = ("uniform", "bell")
NARROWEST = 0.15  # bell with `importance`; float32 draws from a narrower one miss the ends, and so the mean


def masked_diffusion(
    row: Row,
    key: jax.Array,
    special: SpecialIds,
    shifted: bool = True,
    time: str = "uniform",
    width: float = 0.2,
    importance: bool = True,
    exact: bool = True,
    clip: float = 0.0,
) -> Example:
    """Masks k of the row's n maskable tokens, k uniform on 1..n, and weighs each by n/k.

    Maskable are the text tokens that some position has to predict. With k uniform the expected loss is
    exactly the negative evidence bound of an any-order model,

        sum over k of 1/n * n/k * E[sum of nll over k masked tokens],

    divided by n; t = k/n plays the part of the diffusion time. (The paper's code draws
    k = max(1, int(n*t + U)), which favours k = 1 by half a count and is not quite unbiased.)

    The options `shifted`, `time` and `exact` keep the mean; `clip`, and `importance=False` with a bell,
    give it up, and the loss is then no bound.

    Args:
      row: a packed row; its stratified draw is the time.
      key: draws the time and the places.
      special: its `mask` replaces masked tokens.
      shifted: position i predicts token i + 1. False: it predicts token i, the convention of LLaDA, for
        comparison; scoring and generation by filling in masks refuse such a model.
      time: distribution of t; "uniform", or "bell", a normal distribution around 1/2 cut to [0, 1], after
        arXiv 2605.13026.
      width: standard deviation of the bell before it is cut.
      importance: divide the weights by the density of t, which keeps the mean and costs variance; False
        trains on the middle of the bell more than on its ends.
      exact: mask exactly k = 1 + floor(n*t) tokens. False: mask each with probability t, on its own, and
        weigh by 1/t; the mean is the same, the variance larger.
      clip: largest weight; 0 does not clip.

    Raises:
      ValueError: for a bell below `NARROWEST` with `importance`, whose loss would lie below the bound.
    """
    if time == "bell" and importance and width < NARROWEST:
        raise ValueError(f"width={width} must be at least {NARROWEST} with importance=True")
    time_key, place_key = jax.random.split(key)
    maskable_L, targets_L = _targets(row, shifted)
    n = maskable_L.sum()
    t, density = draw_time(row.uniform(time_key), time, width)
    if exact:
        k = jnp.minimum(1 + jnp.floor(t * n).astype(jnp.int32), n)
        masked_L = choose(place_key, maskable_L, k)
        weight = n / jnp.maximum(k, 1)
    else:
        masked_L = maskable_L & (jax.random.uniform(place_key, maskable_L.shape) < t)
        weight = 1 / jnp.maximum(t, jnp.finfo(jnp.float32).tiny)
    weight = weight / density if importance else weight
    weight = jnp.minimum(weight, clip) if clip else weight
    inputs_L = row.tokens_L1[:-1]
    start_L, end_L = document_spans(row.documents_L1[:-1])
    return Example(
        inputs_L=(
            hide(inputs_L, masked_L, special.mask) if shifted else jnp.where(masked_L, special.mask, inputs_L)
        ),
        targets_L=targets_L,
        weights_L=jnp.where(masked_L, weight, 0.0),
        loss_denominator_L=maskable_L.astype(jnp.float32),
        key_start_L=start_L,
        key_end_L=end_L,
    )


def _targets(row: Row, shifted: bool) -> tuple[jax.Array, jax.Array]:
    """Which positions may have to predict their target (bool [L]), and the targets (int32 [L])."""
    if shifted:
        return has_target(row) & is_text(row.tokens_L1[1:]), row.tokens_L1[1:]
    return (row.documents_L1[:-1] >= 0) & is_text(row.tokens_L1[:-1]), row.tokens_L1[:-1]


def draw_time(uniform: jax.Array, time: str, width: float) -> tuple[jax.Array, jax.Array | float]:
    """A time in [0, 1] from a draw from U[0, 1], increasing with it, and its density.

    Args:
      uniform: float32.
      time: one of `TIMES`.
      width: of the bell.
    """
    if time == "uniform":
        return uniform, 1.0
    # Half of the bell is inverted and mirrored, because float32 is exact in the lower tail alone.
    tail = ndtr(-0.5 / jnp.float32(width))
    folded = jnp.minimum(uniform, 1 - uniform)
    z = ndtri(tail + 2 * folded * (0.5 - tail))
    lower = jnp.clip(0.5 + width * z, 0.0, 0.5)
    density = jnp.exp(-0.5 * z**2) / (jnp.sqrt(2 * jnp.pi) * width * (1 - 2 * tail))
    return jnp.where(uniform < 0.5, lower, 1 - lower), density
