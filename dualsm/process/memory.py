"""How the process asks the system for memory."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory(one_arena: bool = True) -> None:
    """Makes the C library keep the memory that is freed, for the process to use again.

    On CPU each step asks for its temporary memory and frees it. By default glibc hands such large blocks
    back, and the system clears every page anew at the next step, which takes a fifth to a third of the time
    of a small one (benchmarks/train_step.py --keep_memory=false). Does nothing under other C libraries.

    Args:
      one_arena: which all threads share, and wait for; other arenas are too small for blocks above 64 MB.
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
