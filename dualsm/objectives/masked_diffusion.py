"""Masked diffusion, shifted (masked next-token prediction) or not; its loss is a likelihood bound (NELBO).

Source: LLaDA (arXiv 2502.09992) for the bound with exact counts, arXiv 2512.14549 for the shift.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from dualsm.objectives.example import Example, Row, SpecialIds, document_spans, has_target, is_text
from dualsm.objectives.masking import choose, hide
from dualsm.objectives.registry import Option, objective
from dualsm.process.value_rules import ANY, at_least, one_of

# Smallest width of a bell with `importance`: float32 draws from a narrower bell miss its tails, which biases
# the loss.
MIN_WIDTH = 0.15


def _too_narrow(options: Mapping) -> str:
    width = options["width"]
    if options["time"] != "bell" or not options["importance"] or width >= MIN_WIDTH:
        return ""
    return (
        f"width={width} is too narrow for importance=True, the loss would be below the bound; use at least "
        f"{MIN_WIDTH} or importance=False"
    )


@objective(
    order=2,
    view="document",
    sees="the document, masked",
    predicts="x_{i+1} where it is masked",
    averages_over="all text, weighted: a likelihood bound",
    shifted=Option(
        "Position i predicts token i + 1. `False`: token i, as in LLaDA. For comparison only: the other "
        "objectives are shifted, and scoring and diffusion sampling reject the model.",
        ANY,
        defines_task=True,
    ),
    time=Option(
        'Distribution of t, the masked fraction. `"bell"`: normal around 1/2, truncated to [0, 1], after '
        "arXiv 2605.13026.",
        one_of(("uniform", "bell")),
    ),
    width=Option(
        f"Standard deviation of the bell before truncation; at least {MIN_WIDTH} with `importance`.",
        at_least(0.05),
    ),
    importance=Option(
        "Divides the weights by the density of t, which keeps the mean and increases the variance. `False`: "
        "masked fractions near 1/2 have a larger effect than others."
    ),
    exact=Option(
        "Masks exactly k = 1 + floor(n t) tokens. `False`: masks each token independently with probability t "
        "and weight 1/t; same mean, larger variance."
    ),
    clip=Option("Largest weight of a token; 0: no limit.", at_least(0)),
    check=_too_narrow,
)
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
    """Masks k of the row's n maskable tokens, with k uniform on 1..n, each with the weight n/k.

    Maskable are the text tokens that are the target of a position. The expected loss is exactly the negative
    evidence lower bound of an any-order model,

        sum over k of 1/n * n/k * E[sum of nll over k masked tokens],

    divided by n, and t = k/n is the diffusion time. (The paper's code draws k = max(1, int(n*t + U)), which
    is slightly biased: it draws k = 1 half a count too often.)

    The options `shifted`, `time` and `exact` keep the mean. With `clip`, or with a bell and
    `importance=False`, the loss is no longer a bound.

    Raises:
      ValueError: for a bell narrower than `MIN_WIDTH` with `importance`.
    """
    if message := _too_narrow({"time": time, "width": width, "importance": importance}):
        raise ValueError(message)
    time_key, position_key = jax.random.split(key)
    maskable_L, targets_L = _targets(row, shifted)
    n = maskable_L.sum()
    t, density = draw_time(row.uniform(time_key), time, width)
    if exact:
        k = jnp.minimum(1 + jnp.floor(t * n).astype(jnp.int32), n)
        masked_L = choose(position_key, maskable_L, k)
        weight = n / jnp.maximum(k, 1)
    else:
        masked_L = maskable_L & (jax.random.uniform(position_key, maskable_L.shape) < t)
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
    """Returns the positions whose target is maskable (bool [L]), and all targets (int32 [L])."""
    if shifted:
        return has_target(row) & is_text(row.tokens_L1[1:]), row.tokens_L1[1:]
    return (row.documents_L1[:-1] >= 0) & is_text(row.tokens_L1[:-1]), row.tokens_L1[:-1]


def draw_time(uniform: jax.Array, time: str, width: float) -> tuple[jax.Array, jax.Array | float]:
    """Maps a draw from U[0, 1] monotonically to a time in [0, 1]; returns the time and its density.

    Args:
      uniform: float32 [].
      time: "uniform" or "bell".
      width: standard deviation of the bell.
    """
    if time == "uniform":
        return uniform, 1.0
    # Only the lower half of the bell is inverted, and then mirrored: float32 is exact in the lower tail only.
    tail = ndtr(-0.5 / jnp.float32(width))
    folded = jnp.minimum(uniform, 1 - uniform)
    z = ndtri(tail + 2 * folded * (0.5 - tail))
    lower = jnp.clip(0.5 + width * z, 0.0, 0.5)
    density = jnp.exp(-0.5 * z**2) / (jnp.sqrt(2 * jnp.pi) * width * (1 - 2 * tail))
    return jnp.where(uniform < 0.5, lower, 1 - lower), density
