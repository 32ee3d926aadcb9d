"""What the chips can do, for model FLOPs utilisation."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

# Dense matrix operations a second in bfloat16, by the start of `device_kind`; makers' figures.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float:
    """Matrix operations a second of one device: by table, or measured where it has no entry."""
    for kind, peak in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return peak
    return measured_flops(device) / jax.local_device_count()  # CPU "devices" share the machine


def measured_flops(device: jax.Device, size: int = 1024, tries: int = 5) -> float:
    """Float32 matrix operations a second, best of several products of [size, size]."""
    a = jax.device_put(jnp.ones((size, size)), device)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
