"""How fast a compiled step can be on a TPU slice or the GPUs of a machine, from the makers' figures."""

from __future__ import annotations

import math
from typing import NamedTuple

from dualsm.aot.hlo import Work
from dualsm.hardware import PEAK_FLOPS


class Chip(NamedTuple):
    """A TPU chip or a GPU.

    Attributes:
      flops: bfloat16 matrix operations a second.
      hbm_bytes: of main memory that programs can use (of TPUs what libtpu's compiler allows).
      hbm_bandwidth: bytes a second.
      link_bandwidth: bytes a second of one link of the interconnect, one way; of GPUs all links together.
      wraps: sizes of a slice's axis are multiples of this when its ends are linked to a ring; 0 for GPUs,
        which a switch joins.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    wraps: int


# cloud.google.com/tpu/docs, links from "How to Scale Your Model", jax-ml.github.io; GPUs (SXM boards) from
# NVIDIA's data sheets.
CHIPS = {
    "v4": Chip(PEAK_FLOPS["TPU v4"], int(31.75 * 2**30), 1.23e12, 45e9, 4),
    "v5e": Chip(PEAK_FLOPS["TPU v5e"], int(15.75 * 2**30), 0.82e12, 45e9, 16),
    "v5p": Chip(PEAK_FLOPS["TPU v5p"], int(95.74 * 2**30), 2.77e12, 90e9, 4),
    "v6e": Chip(PEAK_FLOPS["TPU v6e"], int(31.25 * 2**30), 1.64e12, 90e9, 16),
    "a100": Chip(PEAK_FLOPS["NVIDIA A100"], int(80e9), 2.04e12, 300e9, 0),
    "h100": Chip(PEAK_FLOPS["NVIDIA H100"], int(80e9), 3.35e12, 450e9, 0),
    "h200": Chip(PEAK_FLOPS["NVIDIA H200"], int(141e9), 4.8e12, 450e9, 0),
}


def interconnect_bandwidth(topology: str) -> float:
    """Bytes a second that a chip of "v5e:4x4" or "h200:8" sends in a collective over all of them."""
    name, sizes = topology.split(":")
    chip, sizes = CHIPS[name], [int(size) for size in sizes.split("x") if size != "1"]
    if not chip.wraps:
        return chip.link_bandwidth * len(sizes)
    return sum(2 * chip.link_bandwidth * (1 if size % chip.wraps == 0 else 0.5) for size in sizes)


def estimate(topology: str, devices: int, work: Work, model_flops: float) -> dict:
    """Seconds of a step and the utilisation they mean, between all of the work overlapping and none of it.

    Args:
      topology: "v5e:4x4" or "h200:8".
      devices: in it.
      work: of one device and step.
      model_flops: of one step by formula, all devices together, nothing counted twice for remat.
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
        axes = "both directions of every axis of the slice, half where an axis is no ring"
        links = axes if chip.wraps else "one way"
        assumed.append(f"{bandwidth / 1e9:.0f} GB/s of interconnect a chip ({links})")
    return seconds | {
        "step_seconds_overlapped": fast,
        "step_seconds_serial": slow,
        "mfu_overlapped": model_flops / fast / peak,
        "mfu_serial": model_flops / slow / peak,
        "assumptions": f"{', '.join(assumed)}, each at its peak",
    }
