"""Memory allocation of the C library."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

# Device files of NVIDIA GPUs (also under WSL), AMD GPUs and TPUs.
_ACCELERATORS = ("nvidia[0-9]*", "dxg", "kfd", "accel*", "vfio/[0-9]*")


def keep_freed_memory(one_arena: bool = True) -> None:
    """Makes glibc keep freed memory for reuse by the process; does nothing with other C libraries.

    On CPU each train step allocates and frees its temporary buffers. By default glibc returns such large
    blocks to the operating system, which zeroes every page again in the next step. Zeroing takes a fifth to a
    third of the time of a small step (`benchmarks/train_step.py --keep_memory=false`).

    Args:
      one_arena: share one arena between all threads. Other arenas cannot contain blocks above 64 MB, but in a
        shared arena threads wait for each other.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:
        return
    arena_max, mmap_max, trim_threshold, top_pad = -8, -4, -1, -2  # from malloc.h
    if one_arena:
        mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 2**26)


def may_use_accelerator(platforms: str | None, devices: Path = Path("/dev")) -> bool:
    """Returns False if JAX will use the CPU; does not start JAX's backends.

    Args:
      platforms: value of `jax.config.jax_platforms`.
      devices: directory of the device files.
    """
    if platforms:
        return platforms.split(",")[0] != "cpu"
    has_plugin = any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    return has_plugin and any(file for pattern in _ACCELERATORS for file in devices.glob(pattern))
