"""Properties of chips, and the peak FLOPs per second for model FLOPs utilization."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dualsm.process import distributed


class Gpu(NamedTuple):
    """Properties of a GPU that XLA needs to compile for it, from the data sheets.

    Attributes:
      name: name that the device reports.
      capability: CUDA compute capability, major and minor.
      processors: streaming multiprocessors.
      shared: bytes of shared memory per multiprocessor.
      cache: bytes of the L2 cache.
      clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    shared: int
    cache: int
    clock: float


class Chip(NamedTuple):
    """A TPU chip or a GPU.

    Attributes:
      kinds: regular expression that matches the whole `device_kind`. A slice of a GPU (MIG) must not match.
      flops: dense bfloat16 matrix FLOPs per second.
      hbm_bytes: main memory; for TPUs, the part that libtpu's compiler allows. 0 if ahead-of-time compilation
        for the chip is not supported.
      hbm_bandwidth: bytes per second.
      link_bandwidth: bytes per second in one direction of an interconnect link; for GPUs, of all links.
      wraps: an axis of a slice is a ring if its size is a multiple of this; 0 for GPUs, which use a switch.
      gpu: None for TPUs.
    """

    kinds: str
    flops: float
    hbm_bytes: int = 0
    hbm_bandwidth: float = 0.0
    link_bandwidth: float = 0.0
    wraps: int = 0
    gpu: Gpu | None = None


QUOTA = Path("/sys/fs/cgroup/cpu.max")  # CPU quota of a container

_SXM_A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 164 * 1024, 40 * 2**20, 1.41)
_SXM_H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 228 * 1024, 50 * 2**20, 1.98)
_SXM_H200 = Gpu("NVIDIA H200", (9, 0), 132, 228 * 1024, 50 * 2**20, 1.98)

# TPUs: cloud.google.com/tpu/docs, links from "How to Scale Your Model", jax-ml.github.io. GPUs: NVIDIA's data
# sheets, with half of the figures that assume sparsity.
_TABLE = {
    "v4": Chip("TPU v4", 275e12, int(31.75 * 2**30), 1.23e12, 45e9, 4),
    "v5e": Chip("TPU v5( lite|e)", 197e12, int(15.75 * 2**30), 0.82e12, 45e9, 16),
    "v5p": Chip("TPU v5p?", 459e12, int(95.74 * 2**30), 2.77e12, 90e9, 4),
    "v6e": Chip("TPU v6( lite|e)", 918e12, int(31.25 * 2**30), 1.64e12, 90e9, 16),
    "a100": Chip(
        r"NVIDIA A[18]00(-(SXM|SXM4|PCIE)-\d+GB| 80GB PCIe)",
        312e12, int(80e9), 2.04e12, 300e9, gpu=_SXM_A100,
    ),
    "h100": Chip("NVIDIA H[18]00 80GB HBM3", 989e12, int(80e9), 3.35e12, 450e9, gpu=_SXM_H100),
    "h100-nvl": Chip("NVIDIA H[12]00 NVL", 835e12),
    "h100-pcie": Chip("NVIDIA H[18]00 PCIe", 756e12),
    "gh200": Chip(r"NVIDIA GH200 \d+GB", 989e12),
    "h200": Chip("NVIDIA H200", 989e12, int(141e9), 4.8e12, 450e9, gpu=_SXM_H200),
    "b200": Chip("NVIDIA B200", 2250e12),
    "a10": Chip("NVIDIA A10", 125e12),
    "l4": Chip("NVIDIA L4", 121e12),
    "l40s": Chip("NVIDIA L40S", 362e12),
    "rtx3090": Chip("NVIDIA GeForce RTX 3090", 71e12),
    "rtx4090": Chip("NVIDIA GeForce RTX 4090", 165e12),
}  # fmt: skip

CHIPS = {
    name: chip for name, chip in _TABLE.items() if chip.hbm_bytes
}  # chips with ahead-of-time compilation


def listed_flops(kind: str) -> float | None:
    """Returns the peak FLOPs per second of a device by its `device_kind`; None if it is not in the table."""
    return next((chip.flops for chip in _TABLE.values() if re.fullmatch(chip.kinds, kind)), None)


def peak_flops(device: jax.Device) -> float:
    """Returns the peak matrix FLOPs per second of a device, measured if it is not in the table.

    Every process of a job must call it.
    """
    if listed := listed_flops(device.device_kind):
        return listed
    if device.platform == "cpu":  # CPU devices share the cores, also those of several processes
        processes = distributed.gather(json.dumps(_host_cores()))
        cores = shared_cores(map(json.loads, processes.values()))
        return measured_flops(device, per_core=True) * cores / jax.device_count()
    return measured_flops(device, 4096, jnp.bfloat16)


class Peak:
    """Peak FLOPs per second of a run's devices."""

    def __init__(self, device: jax.Device, devices: int):
        self._flops = peak_flops(device) * devices
        self._is_listed = listed_flops(device.device_kind) is not None

    def utilization(self, flops_per_second: float) -> float:
        """Returns the fraction of the peak; replaces a measured peak if it is exceeded."""
        if not self._is_listed:
            self._flops = max(self._flops, flops_per_second)
        return flops_per_second / self._flops


def measured_flops(
    device: jax.Device, size: int = 1024, dtype=jnp.float32, tries: int = 5, per_core: bool = False
) -> float:
    """Measures the FLOPs per second of a product of [size, size] matrices and returns the maximum.

    Args:
      device: device to measure.
      size: matrix size.
      dtype: matrix type.
      tries: number of measurements.
      per_core: divide by the CPU time of this process instead of wall-clock time, which reduces the effect of
        other processes.
    """
    a = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    clock = time.process_time if per_core else time.perf_counter
    best = float("inf")
    for _ in range(tries):
        start = clock()
        product(a, a).block_until_ready()
        best = min(best, clock() - start)
    return 2 * size**3 / best


def usable_cores() -> float:
    """Returns the number of cores that CPU affinity and the container's quota allow."""
    return shared_cores([_host_cores()])


def shared_cores(processes: Iterable[tuple[str, list[int], float]]) -> float:
    """Returns the number of cores that processes may use together; each core of a host counts once.

    Args:
      processes: `_host_cores` of each process.
    """
    cores: dict[str, set[int]] = {}
    limits: dict[str, float] = {}
    for host, allowed, quota in processes:
        cores[host] = cores.get(host, set()).union(allowed)
        limits[host] = max(limits.get(host, 0), quota)
    return sum(min(len(cores[host]), limits[host]) for host in cores)


def _host_cores() -> tuple[str, list[int], float]:
    """Returns the name of the host, the cores that CPU affinity allows, and the quota in cores."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    try:
        quota, period = map(int, QUOTA.read_text().split())
        return socket.gethostname(), sorted(allowed), quota / period
    except (OSError, ValueError):  # no cgroup v2, or no quota ("max")
        return socket.gethostname(), sorted(allowed), math.inf
