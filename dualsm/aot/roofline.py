"""Roofline estimate of the step time on a TPU slice or the GPUs of one host, from data sheets."""

from __future__ import annotations

import math

from dualsm.aot.hlo import Work
from dualsm.devices.chips import CHIPS


def interconnect_bandwidth(topology: str) -> float:
    """Returns the bytes per second that each chip sends in a collective over a topology such as "v5e:4x4"."""
    name, sizes = topology.split(":")
    chip, sizes = CHIPS[name], [int(size) for size in sizes.split("x") if size != "1"]
    if not chip.wraps:
        return chip.link_bandwidth * len(sizes)
    return sum(2 * chip.link_bandwidth * (1 if size % chip.wraps == 0 else 0.5) for size in sizes)


def estimate(topology: str, devices: int, work: Work, model_flops: float) -> dict:
    """Estimates step time and model FLOPs utilization, with full overlap and without overlap.

    Args:
      topology: for example "v5e:4x4" or "h200:8".
      devices: number of devices.
      work: work per device and step.
      model_flops: FLOPs per step of all devices by formula, without recomputation.
    """
    chip = CHIPS[topology.split(":")[0]]
    bandwidth = interconnect_bandwidth(topology) or math.inf
    seconds = {
        "compute_seconds": work.flops / chip.flops,
        "memory_seconds": work.hbm_bytes / chip.hbm_bandwidth,
        "interconnect_seconds": sum(work.collective_bytes.values()) / bandwidth,
    }
    fast, slow = max(seconds.values()), sum(seconds.values())
    peak = chip.flops * devices
    assumed = [
        f"{chip.flops / 1e12:.0f} TFLOP/s bfloat16",
        f"{chip.hbm_bandwidth / 1e12:.2f} TB/s of main memory",
    ]
    if devices > 1:
        axes = "both directions of every axis of the slice, half for axes that are not rings"
        links = axes if chip.wraps else "one direction"
        assumed.append(f"{bandwidth / 1e9:.0f} GB/s of interconnect per chip ({links})")
    return seconds | {
        "step_seconds_overlapped": fast,
        "step_seconds_serial": slow,
        "mfu_overlapped": model_flops / fast / peak,
        "mfu_serial": model_flops / slow / peak,
        "assumptions": f"{', '.join(assumed)}, each at its peak",
    }
