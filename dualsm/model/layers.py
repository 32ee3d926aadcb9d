"""Linear layers and norms with the initialization and types of `config.model`."""

from __future__ import annotations

from flax import nnx


def initializer(fan_in: int, scale: float = 1.0):
    """Truncated normal with standard deviation scale * sqrt(2 / (5 * fan_in)), as in GPT-BERT."""
    return nnx.initializers.truncated_normal(scale * (2 / (5 * fan_in)) ** 0.5)


def linear(config, inputs: int, outputs: int, *, scale: float = 1.0, bias: bool = False, rngs: nnx.Rngs):
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=initializer(config.d_model, scale),
        dtype=config.dtype,
        rngs=rngs,
    )


def norm(config, size: int | None = None, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(size or config.d_model, epsilon=config.norm_eps, dtype=config.dtype, rngs=rngs)
